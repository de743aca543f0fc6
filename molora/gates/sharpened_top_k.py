"""Top-k whose weights come from the probabilities, sharpened (HotMoE, AAAI 2026)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, softmax_top_k


@register_gate("sharpened_top_k")
class SharpenedTopK(Gate):
    """p = softmax(z); w = softmax(p / `sharpness`) over the K largest p, 0 elsewhere.

    p is in [0, 1], so weights differ by a factor of exp(1 / sharpness) at most.
    """

    takes_top_k = True
    at_most_top_k = True
    default_top_k = 2
    needs_two_active = True

    def __init__(
        self, num_experts: int, top_k: int | None, in_features: int, *, sharpness: float = 0.1
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not sharpness > 0:
            raise ValueError(f"gate option sharpness={sharpness!r} must be above 0")
        self.sharpness = sharpness

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        assert self.top_k is not None
        return Routing(softmax_top_k(probs / self.sharpness, self.top_k), logits, probs)
