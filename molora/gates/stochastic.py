"""One expert by chance in training, the mean of all at inference (THOR, arXiv 2110.04260)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate


@register_gate("stochastic")
class Stochastic(Gate):
    """w = 1 for one expert in training, drawn uniformly at each site for all tokens of a pass;
    w_e = 1/E at inference. The logits have no part in it; p_e = 1/E.

    The recomputation of a checkpointed layer draws the same expert, because checkpointing restores
    the state of torch's random generator. With data parallelism each process draws its own.
    """

    sparse = False  # load is even by construction: a loss that balances it has no gradient
    task_trains_router = False
    draws = True
    constant = True

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = torch.full_like(logits, 1 / self.num_experts)
        if not self.training:
            return Routing(weights=probs, logits=logits, probs=probs)
        experts = torch.arange(self.num_experts, device=logits.device)
        drawn = torch.randint(self.num_experts, (1,), device=logits.device)
        weights = (experts == drawn).to(logits.dtype).expand_as(logits).contiguous()
        return Routing(weights=weights, logits=logits, probs=probs)
