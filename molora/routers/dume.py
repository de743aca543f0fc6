"""DUME: a linear router by ridge regression on whose example a token is from (gensyn-ai/dume)."""

from torch import Tensor

from .. import ops
from .base import register_router
from .prototype import PrototypeRouter


@register_router("dume")
class DumeRouter(PrototypeRouter):
    """z_e = (<w_e, x> + b_e) / temperature, where (w_e, b_e) has length 1.

    (W, b) is (G + ridge I)^-1 H with G = sum of x~ x~^T and H = sum of x~ y^T over tokens, x~ = (x,
    1), y the one-hot number of the adapter whose data the token is of: see `molora.fit_ridge`.
    """

    has_offset = True

    def compare(self, hidden: Tensor, prototypes: Tensor) -> Tensor:
        return ops.router_logits(hidden, prototypes[:, :-1], prototypes[:, -1])
