"""Looking at routing decisions from outside."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .context import RoutingContext, with_changed
from .layer import MoloraLayer
from .routing import Routing, concatenate
from .value_types import is_whole

NO_LAYER = "the model has no MoLoRA layer; call peft.get_peft_model first."


class RoutingRecords(Mapping[str, Routing]):
    """The decisions of each site, by the site's name.

    The tokens of several forward passes (a generation, say) stand one after the other along T.
    """

    def __init__(self) -> None:
        self._records: dict[str, list[Routing]] = {}

    def __getitem__(self, site: str) -> Routing:
        return concatenate(self._records[site])

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


@contextmanager
def observe(model: nn.Module) -> Iterator[RoutingRecords]:
    """Record every routing decision inside the block.

        with molora.observe(model) as records:
            model(**batch)
        records["model.layers.0.mlp.up_proj"].weights  # (T, E)

    Sites without routed experts don't appear. A site that follows another one's decision appears
    with that decision. The tensors are detached. A block inside another one hands its records on to
    that one when it ends.

    Raises:
        ValueError: the model has no MoLoRA layer.
    """
    records = RoutingRecords()
    outer = [context.records for context in routing_contexts(model)]
    try:
        with contexts_with(model, "records", lambda _: records._records):
            yield records
    finally:
        for enclosing in {id(kept): kept for kept in outer if kept is not None}.values():
            for site, decisions in records._records.items():
                enclosing.setdefault(site, []).extend(decisions)


def set_gradient_accumulation(model: nn.Module, steps: int | None, scaler: Any = None) -> None:
    """Tell the auxiliary losses what a loop of one's own does to the task's loss.

    transformers' Trainer (and so TRL) is followed without it; so is accelerate, but for a gradient
    scaler. None for `steps` goes back to that.

    Args:
        model: the model in training.
        steps: micro-batches that the loop adds up before each optimizer step.
        scaler: the loop's `torch.amp.GradScaler`, if it has one.

    Raises:
        ValueError: `steps` is no number of batches, or the model has no MoLoRA layer.
    """
    if steps is not None and not (is_whole(steps) and steps >= 1):
        raise ValueError(f"steps={steps!r} must be a whole number of at least 1, or None.")
    for context in _some_contexts(model):
        context.loss_scale.choose(steps, scaler)


def after_step(model: nn.Module, progress: float | None = None) -> None:
    """Let gates and routers with a state of their own (balance biases, schedules) take a step.

    transformers' Trainer (and so TRL) does it after each optimizer step; a bare loop calls it
    there.

    Args:
        model: the model in training.
        progress: share of the training that is done, in [0, 1], for schedules.

    Raises:
        ValueError: the model has no MoLoRA layer.
    """
    layers = [module for module in model.modules() if isinstance(module, MoloraLayer)]
    if not layers:
        raise ValueError(NO_LAYER)
    for layer in layers:
        layer.after_step(progress)


def routing_contexts(model: nn.Module) -> list[RoutingContext]:
    """The contexts of the base models in `model`, in order (nearly always one)."""
    layers = (module for module in model.modules() if isinstance(module, MoloraLayer))
    return list(dict.fromkeys(layer.routing_context for layer in layers))


def _some_contexts(model: nn.Module) -> list[RoutingContext]:
    contexts = routing_contexts(model)
    if not contexts:
        raise ValueError(NO_LAYER)
    return contexts


@contextmanager
def contexts_with(model: nn.Module, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, an attribute of the model's contexts is what `change` makes of its value before.

    Raises:
        ValueError: the model has no MoLoRA layer.
    """
    with with_changed(_some_contexts(model), name, change):
        yield
