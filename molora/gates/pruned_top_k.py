"""Top-k of the softmax whose weak experts are dropped at evaluation (MoRAM, arXiv 2506.21035)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, normalize, register_gate, select_top_k


@register_gate("pruned_top_k")
class PrunedTopK(Gate):
    """p = softmax(z / temperature); w_e = p_e / sum of the K largest p for those K experts.

    At evaluation an expert with z_e < `threshold` is dropped, and the others keep their weights; a
    token that loses all of its experts gets the base layer's output. `threshold` None drops none.
    """

    takes_top_k = True
    default_top_k = 2
    needs_two_active = True

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        temperature: float = 1.0,
        threshold: float | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not temperature > 0:
            raise ValueError(f"gate option temperature={temperature!r} must be above 0")
        self.temperature = temperature
        self.threshold = threshold
        self.constant_for_one_expert = threshold is None

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        assert self.top_k is not None
        probs = (logits / self.temperature).softmax(-1)
        weights = normalize(probs * select_top_k(logits, self.top_k))
        if self.threshold is not None and not self.training:
            weights = weights * (logits >= self.threshold)
        return Routing(weights=weights, logits=logits, probs=probs)
