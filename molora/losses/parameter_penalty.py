"""Load balancing weighted by the size of the experts (HMoE, arXiv 2408.10681)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("parameter_penalty")
class ParameterPenalty(Loss):
    """L = (E / k) * sum over e of f_e P_e r_e / mean r, which is 1 at perfect balance.

    f, P and k as in "load_balancing"; r_e is the rank of expert e. Using a large expert costs more,
    so that the small ones aren't starved. The published form has the size itself instead of its
    ratio to the mean, and no division by k: mean r times k times this.
    """

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        assert inputs.experts is not None
        ranks = inputs.experts.ranks
        mean_rank = sum(ranks) / len(ranks)
        used = routing.token_mean(routing.selected.to(routing.probs.dtype))
        probability = routing.token_mean(routing.probs)
        mean_active = used.sum().clamp(min=1e-9)
        # Numbers of the host, one by one: a tensor made of them would wait for a GPU to take it.
        shares = (used * probability).unbind()
        pairs = zip(shares, ranks, strict=True)
        penalty = torch.stack([share * (rank / mean_rank) for share, rank in pairs]).sum()
        return routing.num_experts / mean_active * penalty
