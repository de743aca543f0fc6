"""A threshold that depends on the token (AdaMoLE, arXiv 2405.00361)."""

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import Routing, SiteInput
from .base import Gate, normalize, register_gate


@register_gate("learned_threshold")
class LearnedThreshold(Gate):
    """w_e = max(p_e - tau, 0) / sum over all experts, with p = softmax(z).

    tau(x) = max_threshold * sigmoid(w_tau x + b_tau). Up to the default, max_threshold = 1/E, the
    likeliest expert is always selected; above it a token may select none, and its output is then
    the base layer's. The weight depends on tau, and so trains it. The record's extras hold
    "threshold" (T, 1).
    """

    leaves = ("threshold",)

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        max_threshold: float | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if max_threshold is not None and not 0 < max_threshold <= 1:
            raise ValueError(f"gate option max_threshold={max_threshold!r} must be in (0, 1]")
        self.max_threshold = 1 / num_experts if max_threshold is None else max_threshold
        self.constant_for_one_expert = max_threshold is None
        self.threshold = nn.Linear(in_features, 1)

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        layer = self.threshold
        height = ops.router_logits(inputs.hidden, layer.weight, layer.bias)  # (T, 1)
        threshold = self.max_threshold * torch.sigmoid(height)
        probs = logits.softmax(-1)
        return Routing(
            weights=normalize((probs - threshold).relu()),
            logits=logits,
            probs=probs,
            extras={"threshold": threshold},
        )
