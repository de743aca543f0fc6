"""LoRA experts that no longer train: those of earlier tasks, or of adapters that were composed."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from .base import SiteSpec, register_experts
from .lora import LoraExperts
from .start import start_down, start_up


@register_experts("frozen_lora")
class FrozenLoraExperts(LoraExperts):
    """`LoraExperts` of which the first, or all, are frozen.

    The first `frozen` ranks are held in `frozen_A` and `frozen_B`, and the others train in A and B;
    where all are frozen, A and B themselves are. Frozen factors are parameters without a gradient,
    so they are cast, moved and saved like those that train.

    Args:
        frozen: ranks of the first routed experts together; None freezes all, shared ones included.
        init_std: see `LoraExperts`.
    """

    frozen_parameters = ("A", "B")
    asleep = 0  # routed experts in `frozen_A` and `frozen_B`

    def __init__(
        self, spec: SiteSpec, *, frozen: int | None = None, init_std: float | None = None
    ) -> None:
        super().__init__(spec, init_std=init_std)
        self.frozen = frozen
        if frozen is not None:
            self._split(frozen)

    def _split(self, frozen: int) -> None:
        ends = list(accumulate(self.ranks))
        if frozen not in ends or frozen == len(self.A):
            raise ValueError(
                f"expert option frozen={frozen!r} must be the ranks of the first routed experts "
                f"together, and leave some to train; the experts of ranks {list(self.ranks)} end "
                f"at {ends}. frozen=None freezes all."
            )
        self.frozen_parameters = ("frozen_A", "frozen_B")
        self.asleep = ends.index(frozen) + 1
        rest = sum(self.block_ranks("A"))
        self.frozen_A = nn.Parameter(torch.empty(frozen, self.in_features))
        self.frozen_B = nn.Parameter(torch.empty(self.out_features, frozen))
        self.A = nn.Parameter(torch.empty(rest, self.in_features))
        self.B = nn.Parameter(torch.empty(self.out_features, rest))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        """Those that train start as LoRA does; the frozen ones too, until they are loaded."""
        super().reset_parameters(init, base_weight)
        if self.frozen is not None:
            start_down(self.frozen_A, init=True)
            start_up(self.frozen_B, init)

    def block_ranks(self, factor: str) -> tuple[int, ...]:
        return super().block_ranks(factor)[self.asleep :]

    def reorder(self, order: Sequence[int]) -> None:
        if self.frozen is not None:
            raise NotImplementedError("the frozen experts stand first, so none can change places.")
        super().reorder(order)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.frozen is None:
            return self.A, self.B
        return torch.cat([self.frozen_A, self.A]), torch.cat([self.frozen_B, self.B], dim=1)
