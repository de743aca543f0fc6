"""Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("z_loss")
class ZLoss(Loss):
    """L = mean over the real tokens of (log sum over e of exp z_e) squared.

    It keeps the logits small, which keeps low-precision routers stable.
    """

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        return routing.token_mean(routing.logits.logsumexp(-1).square())
