"""A router with one hidden layer, for decisions that aren't linear in the hidden state."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import Router, register_router


@register_router("mlp")
class MLPRouter(Router):
    """z = W_2 silu(W_1 x + b_1) + b_2 in fp32, with `hidden_size` units in between."""

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        hidden_size: int = 64,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        if hidden_size < 1:
            raise ValueError(f"router option hidden_size={hidden_size!r} must be at least 1")
        self.weight_1 = nn.Parameter(torch.empty(hidden_size, in_features))
        self.bias_1 = nn.Parameter(torch.empty(hidden_size))
        self.weight_2 = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias_2 = nn.Parameter(torch.empty(num_experts))

    def reset_parameters(self) -> None:
        for weight in (self.weight_1, self.weight_2):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        nn.init.zeros_(self.bias_1)
        nn.init.zeros_(self.bias_2)

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        inner = F.silu(ops.router_logits(inputs.hidden, self.weight_1, self.bias_1))
        return ops.router_logits(inner, self.weight_2, self.bias_2)
