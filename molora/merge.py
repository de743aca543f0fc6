"""Merging a site whose adapter doesn't depend on the input, and undoing it."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .layer import MoloraLayer


def merge_site(layer: "MoloraLayer", adapter_name: str, safe_merge: bool) -> None:
    """W <- W + delta, computed in fp32 (fp64 in fp64 models).

    Args:
        layer: a site whose adapter of that name isn't routed.
        adapter_name: the adapter.
        safe_merge: refuse a result that isn't finite.

    Raises:
        ValueError: the adapter is routed, or the merged weight isn't finite.
    """
    delta = layer.get_delta_weight(adapter_name)
    weight = layer.get_base_weight()
    merged = (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta).to(weight.dtype)
    if safe_merge and not torch.isfinite(merged).all():
        raise ValueError(
            f"merging the adapter {adapter_name!r} gives a weight that is not finite; the adapter "
            "is broken."
        )
    if layer.quantization_backend is None and layer.unmerged_weight is None:
        layer.unmerged_weight = weight
    layer.set_base_weight(merged)
    layer.merged_adapters.append(adapter_name)


def unmerge_site(layer: "MoloraLayer") -> None:
    """Undo every merge of the site: to the bit, or by subtraction where the base is quantised."""
    if layer.unmerged_weight is not None:
        layer.set_base_weight(layer.unmerged_weight.to(layer.get_base_weight()))
        layer.unmerged_weight = None
        layer.merged_adapters.clear()
    while layer.merged_adapters:
        delta = layer.get_delta_weight(layer.merged_adapters.pop())
        weight = layer.get_base_weight()
        layer.set_base_weight((weight.float() - delta).to(weight.dtype))
