"""Experts of two low-rank factors, stacked along the rank."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .base import SiteSpec, register_experts
from .low_rank import LowRankExperts
from .start import start_up


@register_experts("lora")
class LoraExperts(LowRankExperts):
    """`LowRankExperts` whose factors are parameters, A and B.

    A starts kaiming-uniform (a = sqrt(5)) with the fan-in of one expert, d_in, and B at zero, as in
    LoRA (arXiv 2106.09685); with `init_std`, A is normal with that deviation.
    """

    takes_gaussian = True

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

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        if self.init_std is not None:
            nn.init.normal_(self.A, std=self.init_std)
        elif init == "gaussian":
            ranks = self.block_ranks("A")
            for block, rank in zip(self.A.data.split(ranks), ranks, strict=True):
                nn.init.normal_(block, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        start_up(self.B, init)

    def reorder(self, order: Sequence[int]) -> None:
        for factor, dim in (("A", 0), ("B", 1)):
            if factor != self.tied:
                tensor = getattr(self, factor).data
                blocks = tensor.split(self.ranks + self.shared_ranks, dim)
                always_on = blocks[len(order) :]
                tensor.copy_(torch.cat([*(blocks[e] for e in order), *always_on], dim))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B
