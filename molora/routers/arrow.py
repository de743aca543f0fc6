"""Arrow: an expert is known by the direction that it amplifies most (arXiv 2405.11157)."""

import torch
from torch import Tensor

from .. import ops
from .base import register_router
from .prototype import PrototypeRouter


@register_router("arrow")
class ArrowRouter(PrototypeRouter):
    """z_e = |<x, v_e>| / temperature, v_e the top right singular vector of B_e A_e.

    x is not normalised and the sign of v_e means nothing, as in PEFT's Arrow; the published code's
    temperature is 1.
    """

    def compare(self, hidden: Tensor, prototypes: Tensor) -> Tensor:
        return ops.router_logits(hidden, prototypes, None).abs()


def top_right_singular_vector(A: Tensor, B: Tensor) -> Tensor:
    """(d_in,) unit vector that B A (B (d_out, r), A (r, d_in)) makes longest; 0 where B A is 0.

    From the r x r core of the product, so nothing of size d_out x d_in is formed.
    """
    Qa, Ra = torch.linalg.qr(A.double().mT)  # A = Ra^T Qa^T
    Rb = torch.linalg.qr(B.double(), mode="r").R
    _, values, vectors = torch.linalg.svd(Rb @ Ra.mT)
    return Qa @ vectors[0] * (values[0] > 0)
