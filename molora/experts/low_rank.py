"""What experts of two low-rank factors have in common, wherever the factors come from."""

from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from .. import ops
from .base import Experts, SiteSpec
from .factors import LoraFactors


class LowRankExperts(Experts):
    """y += B G(x) A x, with A (R, d_in), B (d_out, R) and G the routing weights in rank space.

    Row block e of A and column block e of B are expert e; the shared experts come last. A subclass
    gives the factors.

    Attributes:
        tied: the factor, "A" or "B", of which the routed experts share one block; None if each has
            its own of both.
    """

    takes_widened = True
    tied: str | None = None

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self._always_on = sum(self.shared_ranks)
        self._one_scaling = self.scaling[0] if len(set(self.scaling)) == 1 else None
        self._rank_scaling: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, block by block, those of the shared experts last."""
        raise NotImplementedError

    def training_factors(self) -> tuple[Tensor, Tensor]:
        """A and B as a pass in training uses them."""
        return self.factors()

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        ranks, always_on, active = self.ranks, self._always_on, self.active
        if weights is None:
            active = None
        elif weights.shape[-1] > len(ranks):  # the shared experts are weighted too
            ranks, always_on, active = ranks + self.shared_ranks, 0, None
        A, B = self.training_factors() if self.training else self.factors()
        return ops.routed_lora(
            self.dropout(hidden) if self.training else hidden,
            A,
            B,
            weights,
            scale=self._scale(B),
            out=result,
            ranks=ranks,
            always_on=always_on,
            active=active,
            tied=self.tied if ranks else None,
            overwrite=self.overwrites,
        )

    def add_token(
        self, hidden: Tensor, weights: list[tuple[int, float]], result: Tensor
    ) -> Tensor | None:
        A, B = self.factors()
        if A.dtype != hidden.dtype or B.dtype != hidden.dtype:
            return None
        blocks = [(*self._blocks[e], weight * self.scaling[e]) for e, weight in weights]
        for e in range(len(self.ranks), len(self._blocks)):
            blocks.append((*self._blocks[e], self.scaling[e]))
        return ops.add_blocks(hidden, A, B, blocks, result)

    @cached_property
    def _blocks(self) -> list[tuple[int, int, int]]:
        """Of each expert, the shared ones last, the first row in A, the first column in B and the
        rank."""
        starts = []
        for factor in ("A", "B"):
            *own, _ = accumulate(self.block_ranks(factor), initial=0)
            starts.append([0] * (len(self.ranks) - 1) + own if factor == self.tied else own)
        return list(zip(*starts, self.ranks + self.shared_ranks, strict=True))

    def block_ranks(self, factor: str) -> tuple[int, ...]:
        """Ranks of the blocks of factor "A" or "B", those of the shared experts last."""
        return (self.ranks[:1] if factor == self.tied else self.ranks) + self.shared_ranks

    def down_factor(self) -> Tensor:
        if self.tied == "A":
            return super().down_factor()
        return self.factors()[0][: sum(self.ranks)]

    def shared_down_factor(self) -> Tensor:
        if self.tied != "A":
            return super().shared_down_factor()
        return self.factors()[0][: self.ranks[0]]

    def outputs(self, hidden: Tensor) -> Tensor:
        A, B = self._untied(*self.factors())
        inner = (hidden.to(A.dtype) @ A.mT * self._scale(B)).to(B.dtype)
        ranks = self.ranks + self.shared_ranks
        parts = zip(inner.split(ranks, -1), B.split(ranks, -1), strict=True)
        outputs = [u @ b.mT for u, b in parts]
        return torch.stack(outputs[: len(self.ranks)], 1)

    def lora_factors(self) -> LoraFactors:
        A, B = self._untied(*self.factors())
        wide = torch.promote_types(B.dtype, torch.float32)
        per_rank = self._scaling_per_rank(B.device, wide)
        A, B = A.to(wide), B.to(wide)
        if self.tied == "B":
            A = A * per_rank[:, None]
        else:
            B = B * per_rank
        return LoraFactors(A, B, self.ranks + self.shared_ranks, len(self.ranks), self.tied)

    def _untied(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A (R, d_in) and B (d_out, R), a block that experts share repeated for each of them."""
        if self.tied and self.ranks:
            own, repeats = self.ranks[0], len(self.ranks)
            if self.tied == "A":
                A = torch.cat([A[:own].repeat(repeats, 1), A[own:]])
            else:
                B = torch.cat([B[:, :own].repeat(1, repeats), B[:, own:]], dim=1)
        return A, B

    def _scaling_per_rank(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(R,), spread on the host: on a GPU, repeating by a tensor waits for its sum."""
        pairs = zip(self.scaling, self.ranks + self.shared_ranks, strict=True)
        spread = [scaling for scaling, rank in pairs for _ in range(rank)]
        return torch.tensor(spread, device=device, dtype=dtype)

    def _scale(self, like: Tensor) -> float | Tensor:
        """One number when all experts have the same scaling, else one per rank, in fp32 (fp64 in
        fp64 models).

        It isn't a buffer, because PEFT casts an adapter's buffers to the base model's dtype.
        """
        if self._one_scaling is not None:
            return self._one_scaling
        device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        known = self._rank_scaling
        if known is not None and known.device == device and known.dtype == dtype:
            return known
        with torch.inference_mode(False):  # made in a generation, it may be saved for backward
            self._rank_scaling = self._scaling_per_rank(device, dtype)
        return self._rank_scaling
