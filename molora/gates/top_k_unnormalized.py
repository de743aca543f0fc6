"""Top-k of the softmax, kept as probabilities (Shazeer et al., arXiv 1701.06538, without noise)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, select_top_k, softmax_of_token


@register_gate("top_k_unnormalized")
class TopKUnnormalized(Gate):
    """p = softmax(z); w_e = p_e for the K largest, 0 elsewhere. K = 1 keeps a router gradient."""

    takes_top_k = True
    at_most_top_k = True
    default_top_k = 2

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        assert self.top_k is not None
        return Routing(weights=probs * select_top_k(logits, self.top_k), logits=logits, probs=probs)

    def weights_of_token(self, logits: list[float]) -> list[tuple[int, float]] | None:
        assert self.top_k is not None
        return softmax_of_token(logits, self.top_k, normalized=False)
