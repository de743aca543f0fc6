"""Top-1 by probability (Switch Transformer, arXiv 2101.03961)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, select_top_k, softmax_of_token


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
        selected = select_top_k(logits, 1)
        if self.training and self.capacity is not None:
            selected = selected & (_places(selected, inputs) <= self.capacity)
        return Routing(weights=probs * selected, logits=logits, probs=probs)

    def weights_of_token(self, logits: list[float]) -> list[tuple[int, float]] | None:
        return softmax_of_token(logits, 1, normalized=False)


def _places(selected: Tensor, inputs: SiteInput) -> Tensor:
    """(T, E) how many tokens of its sequence chose the expert, up to and including each token."""
    tokens = inputs.tokens
    if tokens is not None:
        sequence = tokens.sequence_ids
    else:
        rows = inputs.shape[0] if len(inputs.shape) > 1 else 1
        count = selected.shape[0]
        sequence = torch.arange(count, device=selected.device) // max(count // max(rows, 1), 1)
    counted = selected if inputs.mask is None else selected & inputs.mask[:, None]
    total = counted.long().cumsum(0)
    starts = torch.ones_like(sequence, dtype=torch.bool)
    starts[1:] = sequence[1:] != sequence[:-1]
    # What the sequences before had chosen only grows, so the largest so far is the last one's.
    before = ((total - counted.long()) * starts[:, None]).cummax(0).values
    return total - before
