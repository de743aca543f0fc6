"""Selection by one head, weighting by another (AdaMoE-VLA)."""

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import Routing, SiteInput
from .base import Gate, register_gate, select_top_k


@register_gate("decoupled")
class Decoupled(Gate):
    """w_e = p_e + (W_s x)_e for the K largest p = softmax(z), 0 elsewhere.

    W_s (E, d_in) starts at zero, so that the gate starts as top-k without renormalisation. The
    weights are unconstrained: they need not sum to 1 and may be negative.
    """

    takes_top_k = True
    default_top_k = 1
    constant_for_one_expert = False

    def __init__(self, num_experts: int, top_k: int | None, in_features: int) -> None:
        super().__init__(num_experts, top_k, in_features)
        self.scale = nn.Parameter(torch.zeros(num_experts, in_features))

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        assert self.top_k is not None
        probs = logits.softmax(-1)
        weights = probs + ops.router_logits(inputs.hidden, self.scale, None)
        selected = select_top_k(logits, self.top_k)
        return Routing(weights=weights * selected, logits=logits, probs=probs)
