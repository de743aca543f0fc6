"""A bank of up factors that all layers share, and a down factor of a few of them (Lily)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import SiteSpec, register_experts
from .low_rank import LowRankExperts
from .start import start_down, start_up


class Factor(nn.Module):
    """One factor that lives once for several sites."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))


@register_experts("up_bank")
class UpBankExperts(LowRankExperts):
    """y += sum over e of w_e s B_e (A x), with the B of all experts shared by all sites alike.

    Sites alike are the same module of every layer, of equal sizes. The bank (d_out, E r) is theirs
    together; A (r, d_in) belongs to `stride` consecutive ones of them. A starts kaiming-uniform
    (a = sqrt(5)) and the bank at zero.

    Args:
        stride: how many consecutive sites share A; 1 gives each its own.
    """

    takes_gaussian = True
    shared_across_sites = ("bank", "down")
    tied = "A"

    def __init__(self, spec: SiteSpec, *, stride: int = 1) -> None:
        super().__init__(spec)
        if stride < 1:
            raise ValueError(f"expert option stride={stride!r} must be at least 1")
        # A single expert whose gate needs no router comes as a shared one.
        ranks = self.ranks or self.shared_ranks
        if (self.ranks and self.shared_ranks) or len(set(ranks)) != 1:
            raise ValueError(
                "experts='up_bank' need one rank for all and no shared experts, not the ranks "
                f"{list(self.ranks)} and {list(self.shared_ranks)}."
            )
        self.block = spec.position // stride
        self.down = Factor(sum(self.block_ranks("A")), self.in_features)
        self.bank = Factor(self.out_features, sum(ranks))

    def sharing_key(self, name: str) -> int | None:
        return self.block if name == "down" else None

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        start_down(self.down.weight, init)
        start_up(self.bank.weight, init)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down.weight, self.bank.weight
