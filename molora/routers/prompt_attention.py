"""Logits from a prompt summarised by attention (MiLoRA, arXiv 2410.18035)."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import register_router
from .sequence import SequenceRouter

# A rational function of degrees 6 and 5 whose distance from GELU is at most 0.0016 in [-4, 4].
NUMERATOR = (0.0, 0.5, 0.405337, 0.134419, 0.0334982, 0.00749775, 0.000788213)
DENOMINATOR = (0.0, 0.268839, 0.0, 0.0149955, 0.0)


@register_router("prompt_attention")
class PromptAttentionRouter(SequenceRouter):
    """z = W_r f(h) for all tokens of a sequence, h = sum over the prompt's tokens t of a_t x_t.

    a is the softmax over these tokens of v . x_t. f works on each feature, a learned rational
    function: sum of a_i u^i for i up to 6, over 1 + |sum of b_j u^j for j from 1 to 5|, which
    starts as GELU. v starts at 0, so that h starts as the mean, and W_r (E, d_in) as the weight of
    a "linear" router does.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        pool: str = "prompt",
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, pool=pool, temperature=temperature, noise=noise)
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.attention = nn.Parameter(torch.empty(1, in_features))
        self.numerator = nn.Parameter(torch.empty(len(NUMERATOR)))
        self.denominator = nn.Parameter(torch.empty(len(DENOMINATOR)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.zeros_(self.attention)
        self.numerator.copy_(torch.tensor(NUMERATOR))
        self.denominator.copy_(torch.tensor(DENOMINATOR))

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """(N, E); see `SequenceRouter`."""
        assert inputs.tokens is not None, "checked"
        scores = ops.router_logits(inputs.hidden, self.attention, None).squeeze(-1)
        weights = inputs.tokens.attention(scores, self.chosen(inputs))
        summary = inputs.tokens.mean(inputs.hidden, weights)
        return ops.router_logits(self._activation(summary), self.weight, None)

    def _activation(self, values: Tensor) -> Tensor:
        a, b = self.numerator.to(values.dtype), self.denominator.to(values.dtype)
        above, below = a[-1].expand_as(values), b[-1] * values
        for coefficient in a[:-1].flip(0):
            above = above * values + coefficient
        for coefficient in b[:-1].flip(0):
            below = (below + coefficient) * values
        return above / (1 + below.abs())
