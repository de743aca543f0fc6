"""Top-1 by probability (Switch Transformer, arXiv 2101.03961)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, select_top_k


@register_gate("switch")
class Switch(Gate):
    """p = softmax(z); the likeliest expert alone, weighted by its own probability.

    Args:
        num_experts: see `Gate`.
        top_k: see `Gate`.
        in_features: see `Gate`.
        capacity: in training, the most tokens of a sequence that an expert takes; those that come
            after get no expert. Tokens count in the order of their sequence and padding doesn't,
            so that no token depends on a later one or on another sequence. None for no limit,
            which is what evaluation and generation have.
    """

    takes_top_k = True
    at_most_top_k = True
    default_top_k = 1
    fixed_top_k = 1

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        capacity: int | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if capacity is not None and capacity < 1:
            raise ValueError(f"gate option capacity={capacity!r} must be at least 1, or None")
        self.capacity = capacity

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        """See `Gate.forward`."""
        probs = logits.softmax(-1)
        return Routing(weights=probs * select_top_k(logits, 1), logits=logits, probs=probs)
