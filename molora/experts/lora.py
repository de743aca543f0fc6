"""Experts of two low-rank factors, stacked along the rank."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .base import Experts, SiteSpec, register_experts
from .factors import LoraFactors


@register_experts("lora")
class LoraExperts(Experts):
    """y += B G(x) A x, with A (R, d_in), B (d_out, R) and G the routing weights in rank space.

    Row block e of A and column block e of B are expert e; the shared experts come last. A starts
    kaiming-uniform (a = sqrt(5)) with the fan-in of one expert, d_in, and B at zero, as in LoRA
    (arXiv 2106.09685); with `init_std`, A is normal with that deviation.

    Attributes:
        tied: the factor, "A" or "B", of which the routed experts share one block; None if each has
            its own of both.
    """

    tied: str | None = None

    def __init__(
        self,
        spec: SiteSpec,
        *,
        init_std: float | None = None,
    ) -> None:
        super().__init__(spec)
        if init_std is not None and not init_std > 0:
            raise ValueError(f"expert option init_std={init_std!r} must be above 0")
        self.init_std = init_std
        self.A = nn.Parameter(torch.empty(sum(self.block_ranks("A")), self.in_features))
        self.B = nn.Parameter(torch.empty(self.out_features, sum(self.block_ranks("B"))))
        self._rank_scaling: Tensor | None = None

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        if self.init_std is not None:
            nn.init.normal_(self.A, std=self.init_std)
        elif init == "gaussian":
            ranks = self.block_ranks("A")
            for block, rank in zip(self.A.data.split(ranks), ranks, strict=True):
                nn.init.normal_(block, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.B)

    def reorder(self, order: Sequence[int]) -> None:
        for factor, dim in (("A", 0), ("B", 1)):
            if factor != self.tied:
                tensor = getattr(self, factor).data
                blocks = tensor.split(self.ranks + self.shared_ranks, dim)
                always_on = blocks[len(order) :]
                tensor.copy_(torch.cat([*(blocks[e] for e in order), *always_on], dim))

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        ranks, always_on, active = self.ranks, sum(self.shared_ranks), self.active
        if weights is not None:
            if weights.shape[-1] > len(ranks):  # the shared experts are weighted too
                ranks, always_on, active = ranks + self.shared_ranks, 0, None
            weights = weights.view(*hidden.shape[:-1], weights.shape[-1])
        A, B = self.factors()
        return ops.routed_lora(
            self.dropout(hidden) if self.training else hidden,
            A,
            B,
            weights,
            scale=self._scale(hidden.device),
            out=result,
            ranks=ranks,
            always_on=always_on,
            active=active if weights is not None else None,
            tied=self.tied if ranks else None,
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as this pass uses them."""
        return self.A, self.B

    def block_ranks(self, factor: str) -> tuple[int, ...]:
        """Ranks of the blocks that factor "A" or "B" stores, those of the shared experts last."""
        return (self.ranks[:1] if factor == self.tied else self.ranks) + self.shared_ranks

    def down_factor(self) -> Tensor:
        if self.tied == "A":
            return super().down_factor()
        return self.factors()[0][: sum(self.ranks)]

    def outputs(self, hidden: Tensor) -> Tensor:
        A, B = self._untied(*self.factors())
        inner = hidden.to(A.dtype) @ A.mT * self._scale(hidden.device)
        ranks = self.ranks + self.shared_ranks
        parts = zip(inner.split(ranks, -1), B.split(ranks, -1), strict=True)
        outputs = [u @ b.mT for u, b in parts]
        return torch.stack(outputs[: len(self.ranks)], 1)

    def lora_factors(self) -> LoraFactors:
        wide = torch.promote_types(self.B.dtype, torch.float32)
        A, B = self._untied(self.A, self.B)
        scaling = torch.tensor(self.scaling, device=B.device, dtype=wide)
        per_rank = scaling.repeat_interleave(self._ranks_tensor(B.device))
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

    def _ranks_tensor(self, device: torch.device) -> Tensor:
        return torch.tensor(self.ranks + self.shared_ranks, device=device)

    def _scale(self, device: torch.device) -> float | Tensor:
        """One number when all experts have the same scaling, else one per rank, in fp32 (fp64 in
        fp64 models).

        It isn't a buffer, because PEFT casts an adapter's buffers to the base model's dtype.
        """
        if len(set(self.scaling)) == 1:
            return self.scaling[0]
        dtype = torch.promote_types(self.B.dtype, torch.float32)
        known = self._rank_scaling
        if known is not None and known.device == device and known.dtype == dtype:
            return known
        with torch.inference_mode(False):  # made in a generation, it may be saved for backward
            scaling = torch.tensor(self.scaling, device=device, dtype=dtype)
            self._rank_scaling = scaling.repeat_interleave(self._ranks_tensor(device))
        return self._rank_scaling
