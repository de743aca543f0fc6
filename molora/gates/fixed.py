"""Weights that are written in the configuration: a mixture that doesn't route."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate


@register_gate("fixed")
class Fixed(Gate):
    """w_e is the e-th of `weights` for every token, whatever the logits; they get no gradient.

    The weights may be negative and need not sum to 1. The probabilities of the record are |w_e|
    over their sum.

    Args:
        weights: one number for each of the E experts.
    """

    sparse = False
    task_trains_router = False
    constant = True

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        weights: Sequence[float],
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not any(weights):
            raise ValueError(f"gate option weights={list(weights)!r} are all 0: nothing is mixed")
        self.weights: Tensor | None = None
        self.numbers = tuple(float(w) for w in weights)
        self.constant_for_one_expert = self.numbers == (1.0,)

    def constant_weights(self) -> Tensor:
        if len(self.numbers) != self.num_experts:
            raise ValueError(
                f"gate option weights={list(self.numbers)} gives {len(self.numbers)} weights for "
                f"{self.num_experts} experts"
            )
        return torch.tensor(self.numbers, dtype=torch.float64)

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        if self.weights is None or self.weights.device != logits.device:
            self.weights = self.constant_weights().to(logits.device)
        weights = self.weights.to(logits.dtype).expand_as(logits)
        probs = weights.abs() / weights.abs().sum(-1, keepdim=True)
        return Routing(weights=weights, logits=logits, probs=probs)
