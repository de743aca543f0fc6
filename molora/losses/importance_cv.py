"""Balance of the total weight of each expert (Shazeer et al., arXiv 1701.06538, eq. 6)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("importance_cv")
class ImportanceCV(Loss):
    """L = var(I) / mean(I)^2 with I_e = sum over the real tokens of w_e: 0 when all I are equal.

    One expert that takes everything gives E - 1. The variance is that of the E values themselves
    (divided by E); ports that divide by E - 1 have E / (E - 1) times this.
    """

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        importance = routing.token_mean(routing.weights)
        mean = importance.mean()
        return importance.var(correction=0) / (mean * mean + 1e-10)
