"""A router in the rank space of experts that share their down factor (Lily, arXiv 2407.09946)."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import Router, register_router

if TYPE_CHECKING:
    from ..experts import Experts
    from ..gates import Gate


@register_router("inner")
class InnerRouter(Router):
    """z = W_r (A x) in fp32, with A (r, d_in) the down factor of all experts and W_r (E, r).

    W_r starts kaiming-uniform with a = sqrt(5). A learns through it too.
    """

    reads_inner = True

    def __init__(
        self, in_features: int, num_experts: int, *, temperature: float = 1.0, noise: float = 0.0
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def check_fit(self, gate: "Gate", experts: "Experts") -> None:
        experts.shared_down_factor()  # or the refusal of experts that have none

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        assert inputs.experts is not None, "the layer passes its experts to the router"
        inner = ops.router_logits(inputs.hidden, inputs.experts.shared_down_factor())
        return ops.router_logits(inner, self.weight)
