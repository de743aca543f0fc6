"""A site's experts as plain LoRA experts, whatever they are parametrised by."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraFactors:
    """y += sum over e of w_e B_e A_e x, with w_e = 1 for what is always on, and the scaling inside
    B, or inside A where B is tied.

    Attributes:
        A: (R, d_in) row block e is expert e, the E routed ones first; fp32 (fp64 in fp64 models).
        B: (d_out, R) column block e is expert e.
        ranks: rank of each block; 0 for an expert that has no part in the site.
        num_routed: E; the blocks after these are always on.
        tied: the factor, "A" or "B", whose blocks are equal for all routed experts; or None.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    num_routed: int
    tied: str | None = None

    def per_rank(self, weights: Tensor | None) -> Tensor:
        """Routing weights (..., E), or (..., E + S) where shared experts are weighted too, as the
        (..., R) gate of rank space; None stands for nothing routed."""
        if weights is None:
            weights = self.A.new_ones(self.num_routed)
        weights = weights.to(self.A)
        always = weights.new_ones(*weights.shape[:-1], len(self.ranks) - weights.shape[-1])
        gate = torch.cat([weights, always], -1)
        ranks = torch.tensor(self.ranks, device=gate.device)
        return gate.repeat_interleave(ranks, -1, output_size=sum(self.ranks))

    def mixed(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """A (q, d_in) and B (d_out, q) of one map, B A, that equals the experts with these weights.

        The experts stand one after another along the rank, those of weight zero left out; where all
        share one factor, the other is summed and q is the rank of one expert.

        Args:
            weights: (E,) or (E + S,) routing weights; None where nothing is routed.
        """
        gate = self.per_rank(weights)
        A, B = self.A, self.B * gate
        if self.tied is not None and self.num_routed:
            own, count = self.ranks[0], self.num_routed
            rest = own * count
            if self.tied == "A":
                summed = B[:, :rest].unflatten(1, (count, own)).sum(1)
                A, B = torch.cat([A[:own], A[rest:]]), torch.cat([summed, B[:, rest:]], 1)
            else:
                summed = (A * gate[:, None])[:rest].unflatten(0, (count, own)).sum(0)
                A, B = torch.cat([summed, A[rest:]]), torch.cat([self.B[:, :own], B[:, rest:]], 1)
            return A, B
        used = gate != 0
        return (A, B) if bool(used.all()) else (A[used], B[:, used])
