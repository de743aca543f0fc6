"""Entropy of a token's distribution over the experts (DynMoLE, arXiv 2504.00661)."""

import math

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("tsallis_entropy")
class TsallisEntropy(Loss):
    """L = mean over the real tokens of S_q(p) / max S_q: 1 for uniform p, 0 for one-hot p.

    S_q(p) = (1 - sum over e of p_e^q) / (q - 1), and its maximum (1 - E^(1-q)) / (q - 1). q = 1 is
    Shannon's entropy over log E; a published coefficient c on the bare entropy (top-p routing,
    arXiv 2403.07652) is c log E here.
    """

    def __init__(self, *, q: float = 1.1) -> None:
        if not q > 0:
            raise ValueError(f"loss option q={q!r} must be above 0")
        self.q = q

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        # A probability that underflows to 0 has no finite gradient for q <= 1.
        probs = routing.probs.clamp(min=1e-30)
        experts = routing.num_experts
        if self.q == 1:
            entropy = -(probs * probs.log()).sum(-1) / math.log(experts)
        else:
            entropy = (1 - probs.pow(self.q).sum(-1)) / (1 - experts ** (1 - self.q))
        return routing.token_mean(entropy)
