"""Static mixtures in an adapter's own file, so that what was calibrated or fixed isn't lost.

Beside a site's parameters stand, under SITE.molora_static., `weights` or `A` and `B`, `fingerprint`
where there is one, and `about`: JSON in UTF-8 bytes, with what `StaticMixture` says in words.
"""

import json
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .layer import MoloraLayer
from .static_mixture import StaticMixture

KEY = ".molora_static."
PREFIX = "base_model.model."


def saved_mixtures(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The entries of the adapter's file; a warning where a mixture has grown stale and is left out.

    Args:
        model: the model that is saved.
        adapter_name: the adapter.
    """
    entries: dict[str, Tensor] = {}
    stale = []
    for module, layer in _layers(model, adapter_name):
        mixture = layer.molora_static.get(adapter_name)
        if mixture is None or mixture.built_in:
            continue
        if not mixture.fits(layer.experts_of(adapter_name)):
            stale.append(module)
            continue
        about = json.dumps({"exact": mixture.exact, "source": mixture.source})
        tensors: dict[str, Tensor | None] = {
            "about": torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8),
            "weights": mixture.weights,
            "fingerprint": mixture.fingerprint,
        }
        if mixture.factors is not None:
            tensors["A"], tensors["B"] = mixture.factors
        entries |= {f"{module}{KEY}{k}": t for k, t in tensors.items() if t is not None}
    if stale:
        warnings.warn(
            f"molora: the experts of {stale[0]!r} and {len(stale) - 1} more modules have changed "
            "since a static mixture was made of them, which is not saved; run molora.calibrate or "
            "molora.fix_routing again.",
            stacklevel=2,
        )
    return entries


def load_mixtures(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Hand the mixtures of an adapter's file to its sites.

    Args:
        model: the model with the adapter injected.
        adapter_name: the adapter.
        state_dict: what the file holds.

    Returns:
        What else it holds.

    Raises:
        ValueError: an entry is of no site, incomplete, or has the wrong shape.
    """
    layers = {module.removeprefix(PREFIX): layer for module, layer in _layers(model, adapter_name)}
    found: dict[str, dict[str, Tensor]] = {}
    for key in state_dict:
        module, mark, name = key.rpartition(KEY)
        if mark:
            found.setdefault(module.removeprefix(PREFIX), {})[name] = state_dict[key]
    for module, tensors in found.items():
        if module not in layers:
            raise ValueError(f"the file has a static mixture of {module!r}, which is no site here.")
        layers[module].molora_static[adapter_name] = _read(layers[module], adapter_name, tensors)
    return {key: value for key, value in state_dict.items() if KEY not in key}


def _read(layer: MoloraLayer, adapter_name: str, tensors: dict[str, Tensor]) -> StaticMixture:
    allocation = layer.molora_allocation[adapter_name]
    site, routed = allocation.site, len(allocation.ranks)
    weights, A, B = (tensors.get(name) for name in ("weights", "A", "B"))
    if A is not None and B is not None:
        fits = A.shape[1:] == (site.in_features,) and B.shape == (site.out_features, len(A))
    else:
        sizes = (routed, routed + len(allocation.shared_ranks))
        fits = weights is not None and weights.dim() == 1 and len(weights) in sizes
    try:
        about = json.loads(bytes(tensors["about"].tolist()).decode())
        exact, source = bool(about["exact"]), str(about["source"])
    except (KeyError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"the static mixture of {site.name!r} in the adapter's file is damaged; save the "
            "adapter again, or copy or download it again."
        )
    factors = None if A is None or B is None else (A, B)
    return StaticMixture(exact, source, weights, factors, tensors.get("fingerprint"))


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, MoloraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, MoloraLayer) and adapter_name in module.molora_allocation:
            yield name, module
