"""Top-1 by probability (Switch Transformer, arXiv 2101.03961)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, select_top_k


@register_gate("switch")
class Switch(Gate):
    """p = softmax(z); the likeliest expert alone, weighted by its own probability."""

    takes_top_k = True
    at_most_top_k = True
    default_top_k = 1
    fixed_top_k = 1

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        return Routing(weights=probs * select_top_k(logits, 1), logits=logits, probs=probs)
