"""A router that never learns: the baseline for what a learned one is worth."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import Router, register_router


@register_router("random")
class RandomRouter(Router):
    """z = W_0 x with a random W_0 (E, d_in) that is saved with the adapter and never trained.

    Equal inputs get equal experts, so padding, the batch and decoding with a cache change nothing.
    W_0 starts as the weight of a "linear" router does.
    """

    weight: Tensor

    def __init__(
        self, in_features: int, num_experts: int, *, temperature: float = 1.0, noise: float = 0.0
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        self.register_buffer("weight", torch.empty(num_experts, in_features))

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        return ops.router_logits(inputs.hidden, self.weight, None)
