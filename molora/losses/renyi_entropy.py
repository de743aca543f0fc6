"""Rényi's entropy of a token's distribution (an option of DynMoLE's code, arXiv 2504.00661)."""

import math

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("renyi_entropy")
class RenyiEntropy(Loss):
    """L = mean over the real tokens of H_q(p) / log E: 1 for uniform p, 0 for one-hot p.

    H_q(p) = log(sum over e of p_e^q) / (1 - q), Shannon's entropy in the limit q = 1. A coefficient
    c on the bare entropy is c log E here. DynMoLE's code adds 1e-5 to every p and counts padding;
    neither is done here.

    Args:
        q: order. A large one looks at the likeliest expert alone, a small one at how many there
            are.
    """

    def __init__(self, *, q: float = 2.0) -> None:
        if not q > 0:
            raise ValueError(f"loss option q={q!r} must be above 0")
        self.q = q

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        # A probability that underflows to 0 has no finite gradient for q <= 1.
        probs = routing.probs.clamp(min=1e-30)
        log_probs = probs.log()
        if self.q == 1:
            entropy = -(probs * log_probs).sum(-1)
        else:
            entropy = (self.q * log_probs).logsumexp(-1) / (1 - self.q)
        return routing.token_mean(entropy) / math.log(max(routing.num_experts, 2))
