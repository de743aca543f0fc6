"""A linear router of the mean of a prompt (MEO, arXiv 2310.09832)."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import register_router
from .sequence import SequenceRouter


@register_router("prompt_mean")
class PromptMeanRouter(SequenceRouter):
    """z = W_r v for all tokens of a sequence, v the mean of a site's inputs over its prompt.

    W_r (E, d_in) starts as the weight of a "linear" router does, or with `zero_init` at 0, for
    gates that draw in training.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        zero_init: bool = False,
        pool: str = "prompt",
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, pool=pool, temperature=temperature, noise=noise)
        self.zero_init = zero_init
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))

    def reset_parameters(self) -> None:
        if self.zero_init:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """(N, E); see `SequenceRouter`."""
        return ops.router_logits(self.mean(inputs.hidden, inputs), self.weight, None)
