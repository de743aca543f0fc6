"""Equal weights: the baseline of a mixture that doesn't route."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate


@register_gate("uniform")
class Uniform(Gate):
    """w_e = p_e = 1/E, whatever the logits; they get no gradient."""

    sparse = False
    task_trains_router = False
    constant = True

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        weights = torch.full_like(logits, 1 / self.num_experts)
        return Routing(weights=weights, logits=logits, probs=weights)
