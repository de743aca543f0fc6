"""All experts where the router is unsure, top-p elsewhere (DynMoLE, arXiv 2504.00661)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, normalize, register_gate, select_top_p


@register_gate("entropy_hybrid")
class EntropyHybrid(Gate):
    """p = softmax(z), and S_q(p) = (1 - sum over e of p_e^q) / (q - 1) is how unsure it is.

    Above `threshold`, w = p. Else experts are added from the likeliest down until their
    probabilities sum to at least `p` and there are `min_experts` of them, and w is p on these,
    scaled to sum to 1. Of equal probabilities the first expert's is added first.

    Args:
        num_experts: see `Gate`.
        top_k: see `Gate`.
        in_features: see `Gate`.
        q: the entropic index; 1 is Shannon's entropy.
        threshold: on S_q itself; its largest value is (1 - E^(1-q)) / (q - 1), 1.88 for E = 8 and
            q = 1.1.
        p: the mass that the experts of a sure token reach.
        min_experts: the fewest experts of a token.
    """

    omits_zeros = True

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        q: float = 1.1,
        threshold: float = 0.9,
        p: float = 0.75,
        min_experts: int = 2,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not q > 0:
            raise ValueError(f"gate option q={q!r} must be above 0")
        if not threshold >= 0:
            raise ValueError(f"gate option threshold={threshold!r} must not be negative")
        if not 0 < p <= 1:
            raise ValueError(f"gate option p={p!r} must be in (0, 1]")
        if min_experts < 1:
            raise ValueError(f"gate option min_experts={min_experts!r} must be at least 1")
        self.q, self.threshold, self.p, self.min_experts = q, threshold, p, min_experts

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        """See `Gate.forward`."""
        probs = logits.softmax(-1)
        selected = select_top_p(probs, self.p, self.min_experts)
        unsure = self._entropy(probs.detach()) > self.threshold
        weights = torch.where(unsure[:, None], probs, normalize(probs * selected))
        return Routing(weights=weights, logits=logits, probs=probs)

    def _entropy(self, probs: Tensor) -> Tensor:
        """(T,) S_q."""
        if self.q == 1:
            return -torch.special.xlogy(probs, probs).sum(-1)
        return (1 - probs.pow(self.q).sum(-1)) / (self.q - 1)
