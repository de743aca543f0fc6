"""Routing weights held fixed: what makes a routed adapter one map, to be merged or exported."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .evaluating import evaluating
from .experts import Experts
from .gates import Gate
from .layer import MoloraLayer, adapted_layers
from .observe import contexts_with, observe
from .routers import Router
from .routing import weigh_by_logits
from .static_mixture import StaticMixture, fingerprint

Weights = Tensor | Sequence[float]
Prompt = Tensor | Mapping[str, Any]


def fix_routing(
    model: nn.Module,
    weights: Weights | Mapping[str, Weights] | None = None,
    *,
    task: int | None = None,
    prompt: Prompt | None = None,
    adapter_name: str = "default",
) -> None:
    """Give the routed sites of an adapter the routing weights to be merged or exported with.

    The forward pass goes on routing; `with molora.static_routing(model)` computes with the fixed
    weights, as the merged model will. `save_pretrained` saves them with the adapter, and
    `PeftModel.from_pretrained` brings them back.

    Args:
        model: a model with a MoLoRA adapter.
        weights: (E,) for all sites, or site name -> (E,) for each; (E + S,) where the gate weighs
            the S shared experts too.
        task: instead of weights, the task whose own ones are meant, where routers read the task
            and nothing else: exact for that task.
        prompt: instead of weights, the prompt whose own ones are meant, where routers decide once
            for a sequence: its token ids (1, n), or all that the forward reads of it. Exact for
            whatever starts with it; the model runs once.
        adapter_name: which adapter.

    Raises:
        ValueError: a site is missing, or its weights have the wrong number or aren't finite; the
            routers read more than the task or the prompt, or don't know the task.
    """
    if sum(given is not None for given in (weights, task, prompt)) != 1:
        raise ValueError("give either weights, a task or a prompt.")
    layers = adapted_layers(model, adapter_name)
    routed = {site: layer for site, layer in layers.items() if layer.is_routed(adapter_name)}
    if not routed:
        raise ValueError(f"the adapter {adapter_name!r} routes nothing; it merges as it is.")
    if task is not None:
        source = f"the routing weights of task {task}"
        given: Mapping[str, Weights] = {
            site: _of_task(layers, site, adapter_name, task) for site in routed
        }
    elif prompt is not None:
        source = "the routing weights of one prompt"
        given = _of_prompt(model, layers, routed, adapter_name, prompt)
    else:
        assert weights is not None
        source, given = "given routing weights", _for_each_site(weights, routed)
    exact = weights is None
    fixed = {
        site: StaticMixture(
            exact,
            source,
            _checked(layer, adapter_name, given),
            # Weights that somebody gives go with any experts, those of a task or prompt with these.
            fingerprint=_fingerprint(layer, adapter_name) if exact else None,
        )
        for site, layer in routed.items()
    }
    for site, layer in routed.items():
        layer.set_static_mixture(adapter_name, fixed[site])


def _for_each_site(
    weights: Weights | Mapping[str, Weights], routed: Mapping[str, MoloraLayer]
) -> Mapping[str, Weights]:
    given = weights if isinstance(weights, Mapping) else dict.fromkeys(routed, weights)
    if given.keys() != routed.keys():
        wrong = sorted(given.keys() ^ routed.keys())
        raise ValueError(
            f"weights must name each routed site once; {wrong[0]!r} is "
            f"{'not one' if wrong[0] in given else 'missing'}."
        )
    return given


def _fingerprint(layer: MoloraLayer, adapter_name: str) -> Tensor | None:
    try:
        return fingerprint(layer.experts_of(adapter_name))
    except ValueError:  # they have no factors that it could be of
        return None


def _who_decides(
    layers: Mapping[str, MoloraLayer], site: str, adapter_name: str
) -> tuple[Experts, Router, Gate]:
    """Of the site whose decision a routed site takes, its own or another's."""
    leader = layers[layers[site].molora_allocation[adapter_name].router_site or site]
    router, gate = leader.molora_router[adapter_name], leader.molora_gate[adapter_name]
    return leader.experts_of(adapter_name), cast(Router, router), cast(Gate, gate)


def _of_task(layers: Mapping[str, MoloraLayer], site: str, adapter_name: str, task: int) -> Tensor:
    _, router, gate = _who_decides(layers, site, adapter_name)
    weights = router.static_weights(gate, task)
    if weights is None:
        raise ValueError(
            f"task={task} doesn't fix the routing weights of {site!r}: its router reads more than "
            "the task. Give weights, or measure what static ones cost by molora.calibrate."
        )
    return weights


@torch.no_grad()
def _of_prompt(
    model: nn.Module,
    layers: Mapping[str, MoloraLayer],
    routed: Iterable[str],
    adapter_name: str,
    prompt: Prompt,
) -> dict[str, Tensor]:
    """The routing weights of each site for a prompt."""
    if not isinstance(prompt, Tensor | Mapping):
        raise ValueError(
            f"prompt={prompt!r} must be a tensor of token ids (1, n), or a mapping of what the "
            "model's forward reads."
        )
    check_only(layers, adapter_name)
    batch = {"input_ids": prompt} if isinstance(prompt, Tensor) else dict(prompt)
    batch = on_device_of(model, batch)
    rows = {len(value) for value in batch.values() if isinstance(value, Tensor)}
    if rows != {1}:
        raise ValueError(f"give one prompt, in tensors of one row; these have {sorted(rows)}.")
    if "input_ids" in batch:  # all of it is prompt, whether or not the pass writes a cache
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        batch.setdefault("prompt_mask", real)
    with evaluating(model), observe(model) as records:
        model(**batch)
    found = {}
    for site in routed:
        experts, router, gate = _who_decides(layers, site, adapter_name)
        weights = records[site].all_weights
        with evaluating(gate):
            alone = weigh_by_logits(gate, records[site].logits, experts, router)
        once = router.per_sequence or router.per_task
        if not once or alone is None or not torch.equal(alone, weights):
            raise ValueError(
                f"a prompt doesn't fix the routing weights of {site!r}: its router or gate reads "
                "each token. Give weights, or measure what static ones cost by molora.calibrate."
            )
        found[site] = weights[-1]
    return found


def check_only(layers: Mapping[str, MoloraLayer], adapter_name: str) -> None:
    """Raise `ValueError` unless that adapter alone makes the difference to the base model."""
    for site, layer in layers.items():
        if layer.merged:
            raise ValueError(f"adapters are merged at {site!r}; call unmerge_adapter first.")
        if layer.disable_adapters or layer.active_adapters != [adapter_name]:
            active = [] if layer.disable_adapters else layer.active_adapters
            raise ValueError(
                f"the adapters {active} are active, and {adapter_name!r} alone is meant; call "
                f"set_adapter({adapter_name!r}) first."
            )


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch's tensors where the model's first parameter is."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _checked(layer: MoloraLayer, adapter_name: str, given: Mapping[str, Weights]) -> Tensor:
    allocation = layer.molora_allocation[adapter_name]
    site = allocation.site.name
    routed, shared = len(allocation.ranks), len(allocation.shared_ranks)
    sizes = sorted({routed, routed + shared})

    def refusal(found: object) -> ValueError:
        return ValueError(
            f"the routing weights of {site!r} must be {' or '.join(map(str, sizes))} finite "
            f"numbers, not {found!r}."
        )

    try:
        weights = torch.as_tensor(given[site], dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise refusal(given[site]) from error
    if weights.dim() != 1 or len(weights) not in sizes or not weights.isfinite().all():
        raise refusal(weights.tolist())
    return weights


@contextmanager
def static_routing(model: nn.Module) -> Iterator[None]:
    """Compute with what stands in for the routing (`fix_routing`, `calibrate`), wherever a site has
    it: the output is that of the merged model, and the base weight isn't touched.

    Raises:
        ValueError: the model has no MoLoRA layer.
    """
    with contexts_with(model, "static", lambda _: True):
        yield


@contextmanager
def unmerged_prompts(model: nn.Module) -> Iterator[None]:
    """Route every token of a generation, also where its prompt has decided for all of them.

    Outside of the block, routers that decide once for a prompt or a task, and their experts, run in
    the first two passes of a generation. What they come to is merged into one low-rank pair for
    each module, which is kept beside the cache: the same numbers, up to rounding, in less time, and
    memory of at most the adapter's size for each cache in use. Passes that it can't hold for (in
    training, with gradients, under autocast or torch.compile, adapters in half precision, gates
    that read more than logits) route as in here.

    Raises:
        ValueError: the model has no MoLoRA layer.
    """
    with contexts_with(model, "merges_prompts", lambda _: False):
        yield
