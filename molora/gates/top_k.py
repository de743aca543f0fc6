"""Top-k of the softmax, renormalised (Mixtral; MoLA, arXiv 2402.08562)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, softmax_of_token, softmax_top_k


@register_gate("top_k")
class TopK(Gate):
    """p = softmax(z); w_e = p_e / sum of the K largest p for those K experts, 0 elsewhere."""

    takes_top_k = True
    at_most_top_k = True
    default_top_k = 2
    needs_two_active = True

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        assert self.top_k is not None
        weights = softmax_top_k(logits, self.top_k)
        return Routing(weights=weights, logits=logits)

    def weights_of_token(self, logits: list[float]) -> list[tuple[int, float]] | None:
        assert self.top_k is not None
        return softmax_of_token(logits, self.top_k)
