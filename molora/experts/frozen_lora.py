"""LoRA experts that no longer train: those of earlier tasks, or of adapters that were composed."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, nn

from .base import SiteSpec, register_experts
from .lora import LoraExperts


@register_experts("frozen_lora")
class FrozenLoraExperts(LoraExperts):
    """`LoraExperts` of which the first, or all, are frozen.

    The first `frozen` ranks are held in `frozen_A` and `frozen_B`, and the others train in A and B;
    where all are frozen, A and B themselves are. Frozen factors are parameters without a gradient,
    so they are cast, moved and saved like those that train, and no `requires_grad_` of the module
    wakes them.

    Args:
        frozen: ranks of the first routed experts together; None freezes all, shared ones included.
        init_std: see `LoraExperts`.
    """

    def __init__(
        self, spec: SiteSpec, *, frozen: int | None = None, init_std: float | None = None
    ) -> None:
        super().__init__(spec, init_std=init_std)
        self.frozen = frozen
        self._asleep: tuple[nn.Parameter, ...] = ()
        if frozen is None:
            self.requires_grad_(True)
            return
        ends = list(accumulate(self.ranks))
        if frozen not in ends or frozen == sum(self.block_ranks("A")):
            raise ValueError(
                f"expert option frozen={frozen!r} must be the ranks of the first routed experts "
                f"together, and leave some to train; the experts of ranks {list(self.ranks)} end "
                f"at {ends}. frozen=None freezes all."
            )
        rest = sum(self.block_ranks("A")) - frozen
        self.frozen_A = nn.Parameter(torch.empty(frozen, self.in_features))
        self.frozen_B = nn.Parameter(torch.empty(self.out_features, frozen))
        self.A = nn.Parameter(torch.empty(rest, self.in_features))
        self.B = nn.Parameter(torch.empty(self.out_features, rest))
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> "FrozenLoraExperts":
        """PEFT wakes and puts to sleep whole modules; what is frozen sleeps on."""
        super().requires_grad_(requires_grad)
        for name in ("A", "B") if self.frozen is None else ("frozen_A", "frozen_B"):
            getattr(self, name).requires_grad = False
        return self

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        """All as new; the frozen ones are there to be loaded."""
        super().reset_parameters(init, base_weight)
        if self.frozen is not None:
            nn.init.kaiming_uniform_(self.frozen_A, a=5**0.5)
            if init is False:
                nn.init.kaiming_uniform_(self.frozen_B, a=5**0.5)
            else:
                nn.init.zeros_(self.frozen_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.frozen is None:
            return self.A, self.B
        return torch.cat([self.frozen_A, self.A]), torch.cat([self.frozen_B, self.B], dim=1)
