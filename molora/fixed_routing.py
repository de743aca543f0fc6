"""Routing weights held fixed: what makes a routed adapter one map, to be merged or exported."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from .gates import Gate
from .layer import MoloraLayer, adapted_layers
from .observe import routing_contexts
from .routers import Router
from .static_mixture import StaticMixture

Weights = Tensor | Sequence[float]


def fix_routing(
    model: nn.Module,
    weights: Weights | Mapping[str, Weights] | None = None,
    *,
    task: int | None = None,
    adapter_name: str = "default",
) -> None:
    """Give the routed sites of an adapter the routing weights to be merged or exported with.

    The forward pass goes on routing; `with molora.static_routing(model)` computes with the fixed
    weights, as the merged model will.

    Args:
        model: a model with a MoLoRA adapter.
        weights: (E,) for all sites, or site name -> (E,) for each; (E + S,) where the gate weighs
            the S shared experts too.
        task: instead of weights, the task whose own ones are meant, where routers read the task
            and nothing else: exact for that task.
        adapter_name: which adapter.

    Raises:
        ValueError: a site is missing, or its weights have the wrong number or aren't finite; the
            routers read more than the task, or don't know it.
    """
    if (weights is None) == (task is None):
        raise ValueError("give either weights or a task.")
    layers = adapted_layers(model, adapter_name)
    routed = {site: layer for site, layer in layers.items() if layer.is_routed(adapter_name)}
    if not routed:
        raise ValueError(f"the adapter {adapter_name!r} routes nothing; it merges as it is.")
    given: Mapping[str, Weights]
    if task is not None:
        given = {site: _of_task(layers, site, adapter_name, task) for site in routed}
    else:
        assert weights is not None
        given = weights if isinstance(weights, Mapping) else dict.fromkeys(routed, weights)
    if given.keys() != routed.keys():
        wrong = sorted(given.keys() ^ routed.keys())
        raise ValueError(
            f"weights must name each routed site once; {wrong[0]!r} is "
            f"{'not one' if wrong[0] in given else 'missing'}."
        )
    source = "given routing weights" if task is None else f"the routing weights of task {task}"
    fixed = {
        site: StaticMixture(task is not None, source, _checked(layer, adapter_name, given))
        for site, layer in routed.items()
    }
    for site, layer in routed.items():
        layer.set_static_mixture(adapter_name, fixed[site])


def _of_task(layers: Mapping[str, MoloraLayer], site: str, adapter_name: str, task: int) -> Tensor:
    leader = layers[layers[site].molora_allocation[adapter_name].router_site or site]
    router = cast(Router, leader.molora_router[adapter_name])
    weights = router.static_weights(cast(Gate, leader.molora_gate[adapter_name]), task)
    if weights is None:
        raise ValueError(
            f"task={task} doesn't fix the routing weights of {site!r}: its router reads more than "
            "the task. Give weights, or measure what static ones cost by molora.calibrate."
        )
    return weights


def _checked(layer: MoloraLayer, adapter_name: str, given: Mapping[str, Weights]) -> Tensor:
    allocation = layer.molora_allocation[adapter_name]
    weights = torch.as_tensor(given[allocation.site.name], dtype=torch.float64).detach()
    routed, shared = len(allocation.ranks), len(allocation.shared_ranks)
    sizes = sorted({routed, routed + shared})
    if weights.dim() != 1 or len(weights) not in sizes or not weights.isfinite().all():
        raise ValueError(
            f"the routing weights of {allocation.site.name!r} must be "
            f"{' or '.join(map(str, sizes))} finite numbers, not {weights.tolist()}."
        )
    return weights


@contextmanager
def static_routing(model: nn.Module) -> Iterator[None]:
    """Compute with what stands in for the routing (`fix_routing`, `calibrate`), wherever a site has
    it: the output is that of the merged model, and the base weight isn't touched.

    Raises:
        ValueError: the model has no MoLoRA layer.
    """
    contexts = routing_contexts(model)
    if not contexts:
        raise ValueError("the model has no MoLoRA layer; call peft.get_peft_model first.")
    before = [context.static for context in contexts]
    for context in contexts:
        context.static = True
    try:
        yield
    finally:
        for context, value in zip(contexts, before, strict=True):
            context.static = value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in the block, and each module's own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
