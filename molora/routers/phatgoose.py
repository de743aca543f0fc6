"""PHATGOOSE: each expert brings the gate that it was trained with (arXiv 2402.05859)."""

import math

import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .base import register_router
from .prototype import PrototypeRouter


@register_router("phatgoose")
class PhatgooseRouter(PrototypeRouter):
    """z_e = <LN(x), LN(v_e)> / sqrt(d_in), LN a layer norm without scale or shift.

    v_e is what stood in y = W x + sigmoid(<v_e, x>) s B_e A_e x when, with the expert frozen, it
    was learned on the expert's own data; `molora.fit_gates` does that.
    """

    def compare(self, hidden: Tensor, prototypes: Tensor) -> Tensor:
        size = (self.in_features,)
        tokens = F.layer_norm(hidden.to(prototypes.dtype), size)
        return ops.router_logits(tokens, F.layer_norm(prototypes, size), None) / math.sqrt(size[0])
