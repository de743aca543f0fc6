"""A linear router of a prompt's mean with a temperature that trains (MoLE, arXiv 2404.13628)."""

import math

import torch
from torch import Tensor, nn

from ..routing import SiteInput
from .base import register_router
from .prompt_mean import PromptMeanRouter


@register_router("learned_temperature")
class LearnedTemperatureRouter(PromptMeanRouter):
    """z = W_r v / tau for all tokens of a sequence, v as in "prompt_mean" and tau trained.

    tau is held as its logarithm, so that it stays above 0. It starts at `temperature`.

    Published: the gate reads what each expert makes of the whole block, all outputs of all tokens
    normalised and flattened, which fixes the sequence's length and costs a pass of the block for
    each expert. Here it reads the mean of the block's input over the prompt: an approximation.
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
        self.start, self.temperature = temperature, 1.0
        self.log_temperature = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.log_temperature, math.log(self.start))

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """(N, E); see `SequenceRouter`."""
        logits = super().compute_logits(inputs)
        return logits / self.log_temperature.to(logits.dtype).exp()
