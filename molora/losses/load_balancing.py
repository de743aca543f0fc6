"""Load balancing (arXiv 1701.06538; Switch Transformer, arXiv 2101.03961, eq. 4)."""

import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("load_balancing")
class LoadBalancing(Loss):
    """L = (E / k) * sum over e of f_e P_e, which is 1 at perfect balance.

    f_e is the share of the real tokens that use expert e, P_e the mean of the router's probability
    for e over the real tokens, and k = sum of f_e the mean number of experts a token uses. The
    gradient flows through P alone.

    Published conventions are multiples of it: Mixtral's and AdaMoLE's k * L, MoLA's L summed over
    the layers instead of averaged, LLaVA-MoLE's L / E, GShard's L / E^2.

    Args:
        first_choice: count each token's likeliest expert only, so that k = 1 (GShard).
        above_threshold: P is the mean of p - tau, which may be negative, with the threshold tau of
            the "learned_threshold" gate (AdaMoLE). Raising tau lowers this loss, too.
    """

    needs_sparse_gate = True

    def __init__(self, *, first_choice: bool = False, above_threshold: bool = False) -> None:
        self.first_choice = first_choice
        self.above_threshold = above_threshold
        self.reads = ("threshold",) if above_threshold else ()

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        selected, probs = routing.selected, routing.probs
        if self.first_choice:
            selected = F.one_hot(probs.argmax(-1), routing.num_experts)
        if self.above_threshold:
            probs = probs - routing.extras["threshold"]
        used = routing.token_mean(selected.to(probs.dtype))
        mean_active = used.sum().clamp(min=1e-9)
        return routing.num_experts / mean_active * (used * routing.token_mean(probs)).sum()
