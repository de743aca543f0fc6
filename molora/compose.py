"""Saved LoRA adapters as the frozen experts of one mixture."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from .compose_sources import LoraAdapter, check_sites, read_lora
from .config import MoloraConfig
from .layer import MoloraLayer, adapted_layers
from .registry import unknown_name_message
from .routers import top_right_singular_vector

# (experts of a token, temperature) as published, where it is. DUME takes the best one alone; at its
# temperature a second one counts only where the two nearly tie.
DEFAULTS = {"arrow": (3, 1.0), "dume": (2, 0.1), "linear": (2, 1.0), "phatgoose": (2, 1.0)}
ROUTERS = (*DEFAULTS, "static")

Gates = Sequence[Mapping[str, Tensor]]
Direction = Callable[[int, str, Tensor, Tensor], Tensor]


@dataclass
class Composition:
    """What a composed adapter will be, before any model is touched.

    Attributes:
        config: its configuration.
        adapters: the experts, in order.
        sites: modules that at least one adapter targets.
        direction: the router's prototype of an expert at a site: (index, site, A, B) -> (d_in,);
            None where the router has none.
        ranks: of each expert, by site; 1 for one that isn't there.
    """

    config: MoloraConfig
    adapters: list[LoraAdapter]
    sites: list[str]
    direction: Direction | None = None
    ranks: dict[str, list[int]] = field(default_factory=dict)

    def describe(self) -> str:
        """A line for each expert, and one for the whole."""
        lines = [
            f"expert {e}: {adapter.source}, {len(adapter.factors)} of {len(self.sites)} sites, "
            f"ranks {_listed(len(A) for A, _ in adapter.factors.values())}"
            for e, adapter in enumerate(self.adapters)
        ]
        config = self.config
        how = f"router {config.router}, gate {config.gate}"
        top_k = "" if config.top_k is None else f", {config.top_k} of {len(self.adapters)}"
        total = _listed(sum(ranks) for ranks in self.ranks.values())
        return "\n".join([*lines, f"{how}{top_k}; total rank of a site: {total}"])


def compose(
    base_model: nn.Module,
    adapters: Sequence[str | Path],
    router: str = "arrow",
    *,
    top_k: int | None = None,
    temperature: float | None = None,
    weights: Sequence[float] | None = None,
    gates: Gates | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Make one mixture of saved LoRA adapters, which become its frozen experts.

        model = molora.compose(base, ["sql", "chat", "maths"], router="arrow")
        model.save_pretrained("mixture")  # PeftModel.from_pretrained(base, "mixture") loads it

    The adapters may differ in rank, alpha, rsLoRA and targets: their scaling goes into B, and an
    adapter that doesn't target a module has a zero expert of rank 1 there, which "arrow",
    "phatgoose" and "dume" never choose. Nothing trains, but for the router "linear".

    Args:
        base_model: the model that the adapters were trained on; it is changed in place.
        adapters: their folders or Hub names.
        router: "arrow" (by the directions that the experts amplify), "phatgoose" (by gates that
            were trained with the experts), "dume" (by a regression on data of each), "static" (the
            same weights for every token, so that `merge_and_unload` is exact) or "linear" (to be
            trained: it starts at random, and may choose an expert where that adds nothing).
        top_k: experts of a token, 2 or more; default: 3 of "arrow", 2 of the others.
        temperature: of the softmax over the chosen experts; default: 0.1 of "dume", else 1.
        weights: for "static", one for each adapter (`fit_weights`); None is 1/E each.
        gates: for each adapter a vector by site: (d_in,) for "phatgoose" (`fit_gates`), (d_in + 1,)
            for "dume" (`fit_ridge`).
        adapter_name: the mixture's name.

    Returns:
        The base model with the mixture as its adapter, in evaluation mode.

    Raises:
        ValueError: an adapter isn't plain LoRA, doesn't fit the base model, or an option doesn't go
            with the router.
    """
    plan = plan_composition(
        base_model, adapters, router, top_k=top_k, temperature=temperature, weights=weights,
        gates=gates,
    )  # fmt: skip
    model = get_peft_model(base_model, plan.config, adapter_name=adapter_name)
    layers = adapted_layers(model, adapter_name)
    assert sorted(layers) == sorted(plan.sites), "every site was named in full"
    for site, layer in layers.items():
        _fill(layer, adapter_name, site, plan)
    return model.eval()


def plan_composition(
    base_model: nn.Module,
    adapters: Sequence[str | Path],
    router: str = "arrow",
    *,
    top_k: int | None = None,
    temperature: float | None = None,
    weights: Sequence[float] | None = None,
    gates: Gates | None = None,
) -> Composition:
    """Read the adapters and decide what `compose` would make of them; arguments and errors are
    `compose`'s."""
    if not adapters:
        raise ValueError("adapters is empty: name at least one.")
    _check_options(router, len(adapters), top_k, temperature, weights, gates)
    loras = [read_lora(adapter) for adapter in adapters]
    sites = check_sites(base_model, loras)
    ranks = {
        site: [len(lora.factors[site][0]) if site in lora.factors else 1 for lora in loras]
        for site in sites
    }
    task_types = {lora.task_type for lora in loras}
    if len(task_types) > 1:
        raise ValueError(f"the adapters are for unlike tasks: {sorted(map(str, task_types))}.")
    settings: dict[str, Any] = {
        "task_type": task_types.pop(),
        "num_experts": len(loras),
        "r": _by_regex(ranks),
        "scaling_rule": "constant",
        "lora_alpha": 1.0,
        "experts": "frozen_lora",
        "target_modules": _targets(base_model, sites),
    }
    if router == "static":
        numbers = [1 / len(loras)] * len(loras) if weights is None else [float(w) for w in weights]
        settings |= {"router": "random", "gate": "fixed", "gate_options": {"weights": numbers}}
        return Composition(MoloraConfig(**settings), loras, sites, None, ranks)
    usual_k, usual_temperature = DEFAULTS[router]
    temperature = usual_temperature if temperature is None else temperature
    settings |= {
        "router": router,
        "router_options": {"temperature": temperature},
        "gate": "top_k",
        "top_k": min(usual_k if top_k is None else top_k, len(loras)),
    }
    if router == "linear":
        return Composition(MoloraConfig(**settings), loras, sites, None, ranks)
    direction = _amplified if router == "arrow" else _of_gates(gates or [], sites, loras)
    return Composition(MoloraConfig(**settings), loras, sites, direction, ranks)


def _check_options(
    router: str,
    count: int,
    top_k: int | None,
    temperature: float | None,
    weights: Sequence[float] | None,
    gates: Gates | None,
) -> None:
    if router not in ROUTERS:
        raise ValueError(unknown_name_message("router to compose by", router, ROUTERS))
    if top_k == 1 and count > 1:
        raise ValueError("top_k=1: top_k=2 with a small temperature comes as near as you like.")
    if router == "static" and (top_k is not None or temperature is not None):
        raise ValueError("router='static' chooses nothing: leave top_k and temperature out.")
    if router != "static" and weights is not None:
        raise ValueError(f"weights are for router='static'; router={router!r} makes its own.")
    if (gates is None) != (router not in ("dume", "phatgoose")):
        raise ValueError(
            f"router={router!r} {'needs' if gates is None else 'has no use for'} gates: a mapping "
            "of site to vector for each adapter, which molora.fit_gates makes for 'phatgoose' and "
            "molora.fit_ridge for 'dume'."
        )
    for name, given in (("weights", weights), ("gates", gates)):
        if given is not None and len(given) != count:
            raise ValueError(f"{name} has {len(given)} entries for {count} adapters.")


def _by_regex(ranks: dict[str, list[int]]) -> dict[str, list[int]]:
    """The regex map for `MoloraConfig.r`: by the last part of the name where that decides."""
    if len({tuple(value) for value in ranks.values()}) == 1:
        return {".*": next(iter(ranks.values()))}
    kinds: dict[str, set[tuple[int, ...]]] = {}
    for site, value in ranks.items():
        kinds.setdefault(site.rpartition(".")[2], set()).add(tuple(value))
    return {
        re.escape(site if len(kinds[kind]) > 1 else kind): value
        for site, value in ranks.items()
        for kind in [site.rpartition(".")[2]]
    }


def _targets(base_model: nn.Module, sites: Iterable[str]) -> list[str]:
    """Short names where every module of that name is a site, else whole ones."""
    sites = set(sites)
    named: dict[str, set[str]] = {}
    for name, _ in base_model.named_modules():
        named.setdefault(name.rpartition(".")[2], set()).add(name)
    last = {site: site.rpartition(".")[2] for site in sites}
    return sorted({last[s] if named[last[s]] <= sites else s for s in sites})


def _amplified(index: int, site: str, A: Tensor, B: Tensor) -> Tensor:
    return top_right_singular_vector(A, B)


def _of_gates(gates: Gates, sites: Iterable[str], loras: Sequence[LoraAdapter]) -> Direction:
    for e, lora in enumerate(loras):
        missing = [site for site in sites if site in lora.factors and site not in gates[e]]
        if missing:
            raise ValueError(
                f"gates[{e}] has no vector for {missing[0]!r}, which {lora.source!r} adapts."
            )

    def direction(index: int, site: str, A: Tensor, B: Tensor) -> Tensor:
        return gates[index][site]

    return direction


@torch.no_grad()
def _fill(layer: MoloraLayer, adapter_name: str, site: str, plan: Composition) -> None:
    """Write the adapters' factors and the router's prototypes into one site."""
    experts: Any = layer.molora_experts[adapter_name]
    d_in, d_out = experts.in_features, experts.out_features
    router: Any = dict(layer.molora_router.items()).get(adapter_name)
    downs, ups, directions = [], [], []
    for e, lora in enumerate(plan.adapters):
        zero = torch.zeros(1, d_in), torch.zeros(d_out, 1)
        A, B = lora.factors.get(site, zero)
        downs.append(A)
        ups.append(B)
        if plan.direction is not None and router is not None:
            here = site in lora.factors
            none = torch.zeros_like(router.prototypes[e])
            directions.append(plan.direction(e, site, A, B).to(none) if here else none)
    experts.A.copy_(torch.cat(downs))
    experts.B.copy_(torch.cat(ups, dim=1))
    if directions:
        router.prototypes.copy_(torch.stack(directions))


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))
