"""A gated two-layer router (MoA, arXiv 2506.05928)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import Router, register_router


@register_router("swiglu")
class SwiGLURouter(Router):
    """z = W_2 (silu(W_1 x + b_1) * (W_3 x + b_3)) + b_2 in fp32, with `expansion` E hidden units.

    The weights start kaiming-uniform (a = sqrt(5)), the biases at zero.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        expansion: int = 4,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        if expansion < 1:
            raise ValueError(f"router option expansion={expansion!r} must be at least 1")
        hidden = expansion * num_experts
        self.weight_1 = nn.Parameter(torch.empty(hidden, in_features))
        self.bias_1 = nn.Parameter(torch.empty(hidden))
        self.weight_3 = nn.Parameter(torch.empty(hidden, in_features))
        self.bias_3 = nn.Parameter(torch.empty(hidden))
        self.weight_2 = nn.Parameter(torch.empty(num_experts, hidden))
        self.bias_2 = nn.Parameter(torch.empty(num_experts))

    def reset_parameters(self) -> None:
        for weight in (self.weight_1, self.weight_2, self.weight_3):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for bias in (self.bias_1, self.bias_2, self.bias_3):
            nn.init.zeros_(bias)

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        opened = F.silu(ops.router_logits(inputs.hidden, self.weight_1, self.bias_1))
        inner = opened * ops.router_logits(inputs.hidden, self.weight_3, self.bias_3)
        return ops.router_logits(inner, self.weight_2, self.bias_2)
