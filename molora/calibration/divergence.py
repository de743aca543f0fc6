"""The routed model and its static stand-in, compared by their logits."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..fixed_routing import evaluating, on_device_of, static_routing
from ..layer import MoloraLayer, adapted_layers
from .moments import Batch
from .report import Divergence


def compare_logits(
    model: nn.Module, batches: Iterable[Batch], adapter_name: str = "default", progress: bool = True
) -> Divergence | None:
    """Three passes over each batch: routed, static and without the adapter; None for no batch.

    Positions that `attention_mask` calls padding don't count.

    Raises:
        ValueError: the model gives no logits.
    """
    layers = adapted_layers(model, adapter_name)
    sums = torch.zeros(5, dtype=torch.float64)
    with evaluating(model), torch.no_grad():
        for batch in tqdm(batches, "Comparing", disable=not progress):
            batch = on_device_of(model, batch)
            real = _real_positions(batch)
            routed = _log_probabilities(model, batch, real)
            with static_routing(model):
                static = _log_probabilities(model, batch, real)
            with _without_adapter(layers):
                base = _log_probabilities(model, batch, real)
            sums += torch.stack([_kl(routed, static), _agreement(routed, static),
                                 _kl(routed, base), _agreement(routed, base),
                                 torch.tensor(float(len(routed)))]).double()  # fmt: skip
    tokens = int(sums[4])
    if tokens == 0:
        return None
    kl, top1, base_kl, base_top1 = (sums[:4] / tokens).tolist()
    return Divergence(tokens, kl, top1, base_kl, base_top1)


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


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum().cpu()


def _agreement(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.argmax(-1) == log_q.argmax(-1)).sum().float().cpu()


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
