"""What an export would write and how large it gets, from the allocation alone."""

from typing import cast

from torch import nn

from ..allocation import SiteAllocation
from ..experts import Experts
from ..layer import adapted_layers
from .lora import HOW_TO_EXPORT
from .moe import planned_moe
from .peft_folder import Source, source_of
from .semantics import gate_record, router_record


def planned(
    model: nn.Module,
    kind: str,
    rank: int | None = None,
    made_static: bool = False,
    adapter_name: str = "default",
) -> str:
    """One line; the model may be on the meta device.

    Args:
        model: a model with the adapter.
        kind: "merged", "lora", "experts", "bundle" or "moe".
        rank: of "lora".
        made_static: a static map will be put in the routing's place.
        adapter_name: the adapter.

    Raises:
        ValueError: what the export itself would raise.
    """
    source = source_of(model, adapter_name) if kind != "merged" else None
    if source is None:
        return _planned_merge(model, made_static, adapter_name)
    if kind == "moe":
        what, size = planned_moe(model, source)
        return f"{what}, {_mib(size)}"
    allocations = [layer.molora_allocation[adapter_name] for layer in source.layers.values()]
    if kind == "lora":
        for layer in source.layers.values():
            if layer.static_mixture(adapter_name) is None and not made_static:
                raise ValueError(HOW_TO_EXPORT.format(name=adapter_name))
        totals = _total_ranks(source)
        most = max(rank or total for total in totals)
        numbers = sum(most * _features(allocation) for allocation in allocations)
        what = f"one LoRA adapter of rank {most} at most"
    else:
        totals = _total_ranks(source)
        ranks = max(max((*a.ranks, *a.shared_ranks)) for a in allocations)
        experts = max(len(a.ranks) for a in allocations)
        shared = max(len(a.shared_ranks) for a in allocations)
        numbers = sum(total * _features(a) for total, a in zip(totals, allocations, strict=True))
        what = f"{experts} routed and {shared} shared experts of rank {ranks} at most"
        if kind == "bundle":
            _describe_routing(source)
            numbers += sum(len(a.ranks) * a.site.in_features for a in allocations if a.owns_router)
            what += ", routers, semantics and test vectors"
    size = numbers * source.dtype.itemsize
    return f"{what}, on {len(allocations)} modules, {_mib(size)}"


def _planned_merge(model: nn.Module, made_static: bool, adapter_name: str) -> str:
    for site, layer in adapted_layers(model, adapter_name).items():
        if layer.static_mixture(adapter_name) is None and not made_static:
            raise ValueError(layer.how_to_merge.format(name=adapter_name, site=site))
    size = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if ".molora_" not in name
    )
    return f"the whole model with the adapter folded in, {_mib(size)}"


def _describe_routing(source: Source) -> None:
    """Raise what the bundle can't describe."""
    for layer in source.layers.values():
        if source.adapter_name in layer.molora_router:
            router_record(layer.molora_router[source.adapter_name])  # type: ignore[arg-type]
            gate_record(layer.molora_gate[source.adapter_name])  # type: ignore[arg-type]


def _total_ranks(source: Source) -> list[int]:
    """R of each site, without the experts that have no part in it, which the allocation counts."""
    banks = (layer.molora_experts[source.adapter_name] for layer in source.layers.values())
    return [sum(cast(Experts, bank).lora_factors().ranks) for bank in banks]


def _features(allocation: SiteAllocation) -> int:
    return allocation.site.in_features + allocation.site.out_features


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
