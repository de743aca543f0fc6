"""Every pair of a down and an up vector is an expert of rank 1 (T-REX, arXiv 2404.08985)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Experts, SiteSpec, register_experts
from .factors import LoraFactors
from .start import start_down, start_up


@register_experts("rank_pairs")
class RankPairExperts(Experts):
    """y += s B G^T A x with A (r1, d_in), B (d_out, r2) and G (r1, r2) the E = r1 r2 weights.

    Expert i r2 + j is the pair of row a_i and column b_j: y += s sum over i, j of G_ij b_j (a_i x).
    A starts kaiming-uniform (a = sqrt(5)), B at zero.

    Args:
        down_vectors: r1, a divisor of E; None is the largest one up to the root of E, 4 of 32.
    """

    takes_gaussian = True

    def __init__(
        self,
        spec: SiteSpec,
        *,
        down_vectors: int | None = None,
    ) -> None:
        super().__init__(spec)
        count = len(self.ranks)
        # A single expert whose gate needs no router comes as a shared one.
        if set(self.ranks + self.shared_ranks) != {1} or (self.shared_ranks and count):
            raise ValueError(
                "experts='rank_pairs' need r=1 and no shared experts, not the ranks "
                f"{list(self.ranks)} and {list(self.shared_ranks)}."
            )
        count = count or len(self.shared_ranks)
        if down_vectors is None:
            down_vectors = max(d for d in range(1, math.isqrt(count) + 1) if count % d == 0)
        if down_vectors < 1 or count % down_vectors:
            raise ValueError(
                f"expert option down_vectors={down_vectors!r} must divide the number of experts, "
                f"{count}."
            )
        self.A = nn.Parameter(torch.empty(down_vectors, self.in_features))
        self.B = nn.Parameter(torch.empty(self.out_features, count // down_vectors))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        start_down(self.A, init)
        start_up(self.B, init)

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        inner = F.linear(self.dropout(hidden).to(self.A.dtype), self.A)  # (..., r1)
        if weights is None:
            pairs = inner.new_ones(self._grid)
        else:
            pairs = weights.view(*hidden.shape[:-1], *self._grid)
        mixed = (inner[..., None] * pairs).sum(-2)  # (..., r2), in fp32 as the weights are
        update = F.linear(mixed.to(inner.dtype), self.B)
        return result + (self.scaling[0] * update).to(result.dtype)

    def lora_factors(self) -> LoraFactors:
        wide = torch.promote_types(self.A.dtype, torch.float32)
        r1, r2 = self._grid
        A = self.A.to(wide).repeat_interleave(r2, 0)
        B = (self.scaling[0] * self.B.to(wide)).repeat(1, r1)
        return LoraFactors(A, B, (1,) * (r1 * r2), len(self.ranks))

    @property
    def _grid(self) -> tuple[int, int]:
        return self.A.shape[0], self.B.shape[1]
