"""Every expert weighed by a sigmoid of its own (MoA, arXiv 2506.05928)."""

import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate


@register_gate("independent")
class Independent(Gate):
    """w_e = sigmoid(z_e): the experts don't compete, so the weights sum to anything up to E.

    The probabilities of the record are w / sum of w over all experts, formed from log w.
    """

    sparse = False
    constant_for_one_expert = False

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        return Routing(logits.sigmoid(), logits, F.logsigmoid(logits).softmax(-1))


@register_gate("independent_threshold")
class IndependentThreshold(Independent):
    """w_e = sigmoid(z_e) where that is at least `threshold`, 0 elsewhere.

    A token may use no expert at all; its output is then the base layer's.
    """

    sparse = True

    def __init__(
        self, num_experts: int, top_k: int | None, in_features: int, *, threshold: float = 0.25
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not 0 < threshold < 1:
            raise ValueError(f"gate option threshold={threshold!r} must be in (0, 1)")
        self.threshold = threshold

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        routing = super().forward(logits, inputs)
        weights = routing.weights
        return Routing(weights * (weights >= self.threshold), logits, routing.probs)
