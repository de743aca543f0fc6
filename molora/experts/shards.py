"""Low-rank factors put together from shards of two pools that all layers share (MoS)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .base import SiteSpec, register_experts
from .low_rank import LowRankExperts


class ShardPool(nn.Module):
    """The shards of all sites alike: A (n, d_in / l) and B (n, d_out / l)."""

    def __init__(self, count: int, down: int, up: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(count, down))
        self.B = nn.Parameter(torch.empty(count, up))


@register_experts("shards")
class ShardExperts(LowRankExperts):
    """Row u of A and column u of B are l shards each, at fixed random places of two pools.

    The pools belong to all L sites alike (the same module of every layer) and hold e L l shards of
    d_in / l or d_out / l features: as many parameters as LoRA of rank e. Of the R ranks of a site,
    `private_rank` have shards that no other site uses; the others draw theirs without replacement
    from those that are left. A and B draw independently. Which shards a site uses is saved with the
    adapter, and no gradient moves it.

    Pool A starts kaiming-uniform (a = sqrt(5)) with the fan-in of a whole row, d_in, and pool B at
    zero.

    Args:
        pool_rank: e, which sets the size of the pools.
        shards: l, a divisor of d_in and d_out.
        private_rank: ranks of each site that are its own; the last ones.
    """

    shared_across_sites = ("pool",)
    places_A: Tensor
    places_B: Tensor

    def __init__(
        self, spec: SiteSpec, *, pool_rank: int = 2, shards: int = 4, private_rank: int = 0
    ) -> None:
        super().__init__(spec)
        d_in, d_out = self.in_features, self.out_features
        for name, value, least in (
            ("pool_rank", pool_rank, 1),
            ("shards", shards, 1),
            ("private_rank", private_rank, 0),
        ):
            if value < least:
                raise ValueError(f"expert option {name}={value!r} must be at least {least}")
        if d_in % shards or d_out % shards:
            raise ValueError(
                f"expert option shards={shards!r} must divide the {d_in} input and {d_out} output "
                "features of the site."
            )
        self.total = sum(self.ranks) + sum(self.shared_ranks)
        common = (pool_rank - private_rank) * spec.sites
        if private_rank > min(pool_rank, self.total) or self.total - private_rank > common:
            raise ValueError(
                f"expert options pool_rank={pool_rank}, private_rank={private_rank}: {spec.sites} "
                f"sites share pools for {max(common, 0)} ranks beside their private ones, and each "
                f"needs {self.total - private_rank}; raise pool_rank or lower r."
            )
        self.shards, self.private_rank, self.position = shards, private_rank, spec.position
        self.common = common * shards
        count = pool_rank * spec.sites * shards
        self.pool = ShardPool(count, d_in // shards, d_out // shards)
        for name in ("places_A", "places_B"):
            self.register_buffer(name, torch.zeros(self.total, shards, dtype=torch.int64))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        nn.init.uniform_(self.pool.A, -1 / math.sqrt(self.in_features), self.in_features**-0.5)
        if init is False:
            bound = 1 / math.sqrt(self.total)
            nn.init.uniform_(self.pool.B, -bound, bound)
        else:
            nn.init.zeros_(self.pool.B)
        own = self.private_rank * self.shards
        start = self.common + self.position * own
        for places in (self.places_A, self.places_B):
            drawn = torch.randperm(self.common)[: self.total * self.shards - own]
            chosen = torch.cat([drawn, torch.arange(start, start + own)])
            places.copy_(chosen.view_as(places))

    def reorder(self, order: Sequence[int]) -> None:
        for places in (self.places_A, self.places_B):
            blocks = places.split(self.ranks + self.shared_ranks)
            places.copy_(torch.cat([*(blocks[e] for e in order), *blocks[len(order) :]]))

    def factors(self) -> tuple[Tensor, Tensor]:
        # The pools are on the device of the first site.
        device = self.places_A.device
        A = self.pool.A.to(device)[self.places_A].flatten(1)
        B = self.pool.B.to(device)[self.places_B].flatten(1)
        return A, B.mT

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shards={self.shards}, private_rank={self.private_rank}"
