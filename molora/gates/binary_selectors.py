"""Selectors with a smooth binary code (DSelect-k, arXiv 2106.03760)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, normalize, register_gate


@register_gate("binary_selectors")
class BinarySelectors(Gate):
    """K selectors that each point at an expert by a binary code of m = ceil(log2 E) bits.

    The router gives K m bit logits and K mixing logits a. With the smooth step S(t), which is 0
    below -gamma / 2, 1 above gamma / 2 and a cubic between, selector i has the bits b = S(z_i) and
    puts r_i(e) = product over j of (b_j if bit j of e is set, else 1 - b_j) on expert e;
    w = sum over i of softmax(a)_i r_i. It starts dense and is exactly sparse, with at most K
    experts a token, once the bits have left the cubic part: from there they get no gradient.

    Where E is no power of two, some codes stand for no expert, and the weights sum to less than 1.
    The record's extras hold "selectors" (T, K, E), the r_i, for the loss "selector_entropy".
    """

    takes_top_k = True
    default_top_k = 2
    leaves = ("selectors",)
    codes: Tensor

    def __init__(
        self, num_experts: int, top_k: int | None, in_features: int, *, gamma: float = 1.0
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not gamma > 0:
            raise ValueError(f"gate option gamma={gamma!r} must be above 0.")
        self.gamma = gamma
        self.bits = (num_experts - 1).bit_length()
        experts = torch.arange(num_experts)[:, None]
        codes = (experts >> torch.arange(self.bits)) & 1 == 1  # (E, m)
        self.register_buffer("codes", codes, persistent=False)

    @property
    def num_logits(self) -> int:
        return (self.top_k or 1) * (self.bits + 1)

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        assert self.top_k is not None
        split = self.top_k * self.bits
        bits = self._smooth_step(logits[:, :split].unflatten(-1, (self.top_k, self.bits)))
        factors = torch.where(self.codes, bits[:, :, None], 1 - bits[:, :, None])
        selectors = factors.prod(-1)  # (T, K, E)
        mixing = logits[:, split:].softmax(-1)
        weights = (mixing[:, :, None] * selectors).sum(1)
        return Routing(
            weights=weights,
            logits=logits,
            probs=normalize(weights),
            extras={"selectors": selectors},
        )

    def _smooth_step(self, t: Tensor) -> Tensor:
        inner = t.clamp(-self.gamma / 2, self.gamma / 2) / self.gamma
        return -2 * inner**3 + 1.5 * inner + 0.5
