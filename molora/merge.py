"""Merging a site whose adapter doesn't depend on the input, and undoing it."""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .layer import MoloraLayer


def refuse_tied(model: nn.Module, layer: "MoloraLayer", site: str) -> None:
    """Raise `ValueError` where a site's weight is another module's too, such as the embedding's.

    Args:
        model: the base model with its adapters.
        layer: the site that is to be merged.
        site: its name.
    """
    base = layer.get_base_layer()
    others = (
        name
        for name, module in model.named_modules()
        if module is not base and any(p is base.weight for p in module._parameters.values())
    )
    other = next(others, None)
    if other is not None:
        raise ValueError(
            f"the weight of {site!r} is that of {other!r} too, and merging would change both. Keep "
            "it as an adapter, export it (molora.export_lora), or untie them before the "
            "adapter is made: load the model with tie_word_embeddings=False and copy the weight."
        )


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
