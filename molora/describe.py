"""The allocation of a model as a table."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from .allocation import SiteAllocation
from .layer import MoloraLayer

COLUMNS = ("site", "experts", "ranks", "K", "shared", "R", "router", "trainable parameters")


@dataclass(frozen=True)
class SiteRow:
    """One line of the table: a site, or equal sites of several layers.

    Attributes:
        name: dotted name; layer numbers that several sites differ in stand in braces.
        experts: routed experts, E.
        ranks: ranks of the routed experts; of a feed-forward network with the modules that it is
            about.
        top_k: K, "varies" for gates that select no fixed number, "-" where nothing is routed.
        shared: ranks of the experts that are always on.
        total_rank: R.
        router: "own", the name of the module that decides, or "none".
        parameters: trainable parameters, router included, of all sites of the row.
    """

    name: str
    experts: int
    ranks: str
    top_k: str
    shared: str
    total_rank: int
    router: str
    parameters: int


def site_rows(model: nn.Module, adapter_name: str = "default") -> list[SiteRow]:
    """One row per site of that adapter, in the order of the model.

    Raises:
        ValueError: the model has no site with an adapter of that name.
    """
    rows = [
        _row(module, adapter_name)
        for module in model.modules()
        if isinstance(module, MoloraLayer) and adapter_name in module.molora_experts
    ]
    if not rows:
        raise ValueError(f"the model has no MoLoRA adapter named {adapter_name!r}.")
    return rows


def describe(model: nn.Module, adapter_name: str = "default", every_site: bool = False) -> str:
    """What each site got, as a table that ends in the sum of trainable parameters.

    Args:
        model: a model with a MoLoRA adapter.
        adapter_name: which one.
        every_site: one line per site; else equal sites of several layers share a line.
    """
    rows = site_rows(model, adapter_name)
    shown = rows if every_site else join_layers(rows)
    cells: list[tuple[str, ...]] = [COLUMNS]
    cells += [
        (
            row.name,
            str(row.experts),
            row.ranks,
            row.top_k,
            row.shared,
            str(row.total_rank),
            row.router,
            f"{row.parameters:,}",
        )
        for row in shown
    ]
    total = sum(row.parameters for row in rows)
    return f"{_aligned(cells)}\n{len(rows)} sites, {total:,} trainable parameters in adapters"


def join_layers(rows: Iterable[SiteRow]) -> list[SiteRow]:
    """Rows that differ only in the number of their layer become one, in the order of the first."""
    groups: dict[SiteRow, list[SiteRow]] = {}
    for row in rows:
        key = replace(row, name=re.sub(r"\.\d+\.", ".{}.", row.name, count=1))
        groups.setdefault(key, []).append(row)
    return [_joined(group) for group in groups.values()]


def _row(layer: MoloraLayer, adapter_name: str) -> SiteRow:
    allocation = layer.molora_allocation[adapter_name]
    parts = (layer.molora_experts, layer.molora_router, layer.molora_gate)
    own = [part[adapter_name] for part in parts if adapter_name in part]
    return SiteRow(
        name=allocation.site.name,
        experts=len(allocation.ranks),
        ranks=_ranks(allocation),
        top_k=_top_k(allocation),
        shared=_compact(allocation.shared_ranks),
        total_rank=allocation.total_rank,
        router=_router(allocation),
        parameters=sum(map(_trained, own)),
    )


def _trained(part: nn.Module) -> int:
    """Parameters that train, whether or not the adapter was loaded to do so."""
    frozen = getattr(part, "frozen_parameters", ())
    return sum(p.numel() for name, p in part.named_parameters() if name not in frozen)


def _router(allocation: SiteAllocation) -> str:
    if allocation.router_site is None:
        return "none"
    return "own" if allocation.owns_router else allocation.router_site.rpartition(".")[2]


def _top_k(allocation: SiteAllocation) -> str:
    if not allocation.is_routed:
        return "-"
    return "varies" if allocation.top_k is None else str(allocation.top_k)


def _ranks(allocation: SiteAllocation) -> str:
    if not allocation.parts:
        return _compact(allocation.ranks)
    modules: dict[str, list[str]] = {}
    for part in allocation.parts:
        modules.setdefault(_compact(part.ranks), []).append(part.site.module)
    return "; ".join(f"{','.join(names)} {ranks}" for ranks, names in modules.items())


def _compact(ranks: tuple[int, ...]) -> str:
    if not ranks:
        return "-"
    return f"{len(ranks)}x{ranks[0]}" if len(set(ranks)) == 1 else ",".join(map(str, ranks))


def _joined(group: list[SiteRow]) -> SiteRow:
    if len(group) == 1:
        return group[0]
    numbers = [int(re.search(r"\.(\d+)\.", row.name)[1]) for row in group]  # type: ignore[index]
    name = re.sub(r"\.\d+\.", f".{{{_spans(numbers)}}}.", group[0].name, count=1)
    return replace(group[0], name=name, parameters=sum(row.parameters for row in group))


def _spans(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _aligned(cells: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    left = {0, 2, 4, 6}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
