"""Entropy of selectors that point at experts (DSelect-k, arXiv 2106.03760, section 3.2)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("selector_entropy")
class SelectorEntropy(Loss):
    """L = token mean of the sum over the selectors of H(r_i) + 1 / sum over e of r_i(e) - 1.

    It is 0 when every selector points at one expert. The second term, which is 0 where the number
    of experts is a power of two, keeps selectors off the codes that stand for no expert.

    For gate="binary_selectors" only. The paper raises its coefficient from about 1e-6 during
    training; here it is constant.
    """

    reads = ("selectors",)

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        selectors = routing.extras["selectors"]
        entropy = -(selectors * selectors.clamp_min(1e-30).log()).sum(-1)
        missing = 1 / selectors.sum(-1).clamp_min(1e-6) - 1
        return routing.token_mean((entropy + missing).sum(-1))
