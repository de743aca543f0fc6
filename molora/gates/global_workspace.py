"""Uncertain tokens go to every expert in training (GW-MoE, arXiv 2406.12375)."""

import math

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, normalize, register_gate, select_top_k


@register_gate("global_workspace")
class GlobalWorkspace(Gate):
    """Top-k, renormalised; but in training a token whose router is undecided learns everywhere.

    p = softmax(z). A token with entropy H(p) >= h uses all experts with w = p; every other token,
    and every token at inference, uses the K likeliest with w_e = p_e / their sum. The threshold h
    is `entropy` times log E, the largest value that H can take.
    """

    takes_top_k = True
    default_top_k = 2
    needs_two_active = True

    def __init__(
        self, num_experts: int, top_k: int | None, in_features: int, *, entropy: float = 0.77
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not 0 < entropy <= 1:
            raise ValueError(f"gate option entropy={entropy!r} must be in (0, 1]")
        self.entropy = entropy

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        assert self.top_k is not None
        weights = normalize(probs * select_top_k(logits, self.top_k))
        if self.training:
            ceiling = math.log(self.num_experts)
            uncertain = -(probs * log_probs).sum(-1, keepdim=True) >= self.entropy * ceiling
            weights = torch.where(uncertain, probs, weights)
        return Routing(weights=weights, logits=logits, probs=probs)
