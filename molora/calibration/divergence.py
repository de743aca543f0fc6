"""The routed model and its static stand-in, compared by their logits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..evaluating import evaluating
from ..fixed_routing import on_device_of, static_routing
from ..layer import MoloraLayer, adapted_layers
from ..static_mixture import StaticMixture
from .moments import Batch
from .report import Divergence


def compare_logits(
    model: nn.Module,
    batches: Iterable[Batch],
    stand_ins: Sequence[Mapping[str, StaticMixture]],
    adapter_name: str = "default",
    progress: bool = True,
) -> list[Divergence | None]:
    """Passes over each batch: routed, without the adapter, and one for each static stand-in.

    Positions that `attention_mask` calls padding don't count.

    Args:
        model: a model of which this adapter, and no other, is active.
        batches: keyword arguments of the model's forward.
        stand_ins: for each, site -> what is held there; what was held before is put back.
        adapter_name: the adapter.
        progress: show a progress bar.

    Returns:
        One for each of `stand_ins`; None for no batch.

    Raises:
        ValueError: the model gives no logits, or the adapter is merged.
    """
    layers = adapted_layers(model, adapter_name)
    base_sums, *static_sums = torch.zeros(1 + len(stand_ins), 2, dtype=torch.float64)
    tokens = 0
    with evaluating(model), torch.no_grad():
        for batch in tqdm(batches, "Comparing", disable=not progress):
            batch = on_device_of(model, batch)
            real = _real_positions(batch)
            routed = _log_probabilities(model, batch, real)
            tokens += len(routed)
            with _without_adapter(layers):
                base_sums += _differences(routed, _log_probabilities(model, batch, real))
            for sums, mixtures in zip(static_sums, stand_ins, strict=True):
                with _holding(layers, adapter_name, mixtures), static_routing(model):
                    sums += _differences(routed, _log_probabilities(model, batch, real))
    if tokens == 0:
        return [None] * len(stand_ins)
    base_kl, base_top1 = (base_sums / tokens).tolist()
    means = [(sums / tokens).tolist() for sums in static_sums]
    return [Divergence(tokens, kl, top1, base_kl, base_top1) for kl, top1 in means]


def _log_probabilities(model: nn.Module, batch: Batch, real: Tensor | None) -> Tensor:
    """(N, classes) fp32, of the real positions."""
    output = model(**batch)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise ValueError(f"{type(output).__name__} has no logits to compare models by.")
    if real is not None and logits.shape[:-1] == real.shape:
        logits = logits[real]
    return logits.flatten(0, -2).float().log_softmax(-1)


def _real_positions(batch: Batch) -> Tensor | None:
    """Of a decoder's output, where the model has one of its own, else of the input."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and isinstance(mask, Tensor) and labels.shape != mask.shape:
        return labels != -100
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _differences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(2,) sums over the positions: KL divergence, and equal most likely tokens."""
    kl = (log_p.exp() * (log_p - log_q)).sum()
    equal = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return torch.stack([kl, equal.to(kl)]).double().cpu()


@contextmanager
def _holding(
    layers: Mapping[str, MoloraLayer], adapter_name: str, mixtures: Mapping[str, StaticMixture]
) -> Iterator[None]:
    before = {site: layers[site].molora_static.get(adapter_name) for site in mixtures}
    try:
        for site, mixture in mixtures.items():
            layers[site].set_static_mixture(adapter_name, mixture)
        yield
    finally:
        for site, previous in before.items():
            layers[site].molora_static.pop(adapter_name, None)
            if previous is not None:
                layers[site].molora_static[adapter_name] = previous


@contextmanager
def _without_adapter(layers: Mapping[str, MoloraLayer]) -> Iterator[None]:
    # Not by PEFT's own way, which sets requires_grad anew when it is left.
    before = [layer._disable_adapters for layer in layers.values()]
    for layer in layers.values():
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers.values(), before, strict=True):
            layer._disable_adapters = disabled
