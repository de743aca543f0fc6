"""Every expert by its probability, some of them left out in training (SMEAR, arXiv 2306.03745)."""

import torch
from torch import Tensor

from ..registry import unknown_name_message
from ..routing import Routing, SiteInput
from .base import Gate, register_gate

UNITS = ("token", "sequence")


@register_gate("expert_dropout")
class ExpertDropout(Gate):
    """w = softmax(z); in training w_e = m_e p_e / (sum over f of m_f p_f + 1e-10), with m_e = 0 by
    chance.

    Args:
        num_experts: see `Gate`.
        top_k: see `Gate`.
        in_features: see `Gate`.
        dropout: probability of m_e = 0.
        unit: what m is drawn for, each "token" or each "sequence" of the batch.
    """

    draws = True
    sparse = False

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        dropout: float = 0.1,
        unit: str = "token",
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not 0 <= dropout < 1:
            raise ValueError(f"gate option dropout={dropout!r} must be in [0, 1)")
        if unit not in UNITS:
            raise ValueError(unknown_name_message("gate option unit", unit, UNITS))
        self.dropout = dropout
        self.unit = unit

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        """See `Gate.forward`."""
        probs = logits.softmax(-1)
        weights = probs
        if self.training and self.dropout > 0:
            kept = probs * self._mask(logits, inputs)
            weights = kept / (kept.sum(-1, keepdim=True) + 1e-10)
        return Routing(weights=weights, logits=logits, probs=probs)

    def _mask(self, logits: Tensor, inputs: SiteInput) -> Tensor:
        """(T, E) zeros and ones."""
        tokens = inputs.tokens if self.unit == "sequence" else None
        rows = len(logits) if tokens is None else tokens.num_sequences
        mask = torch.rand(rows, self.num_experts, device=logits.device) >= self.dropout
        return (mask if tokens is None else tokens.spread(mask)).to(logits.dtype)
