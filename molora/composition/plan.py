"""What a composed adapter will be, before any model is touched."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn

from ..config import MoloraConfig
from ..feedforward_sites import find_networks, gather
from ..sites import Site, in_run_order
from .base import COMPOSERS, Composer, trained_or_frozen
from .sources import LoraAdapter, read_loras


@dataclass
class Composition:
    """A composed adapter.

    Attributes:
        config: its configuration.
        adapters: the experts, in order.
        sites: modules that at least one adapter targets.
        composer: what weighs them.
        ranks: of each expert, by site; 1 for one that isn't there.
    """

    config: MoloraConfig
    adapters: list[LoraAdapter]
    sites: list[str]
    composer: Composer
    ranks: dict[str, list[int]]

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
        lines.append(f"{how}{top_k}, mixing {config.mixing}; total rank of a site: {total}")
        if self.composer.needs_training and len(self.adapters) > 1:
            lines.append("its router starts at random: train it before use")
        return "\n".join(lines)


def plan_composition(
    base_model: nn.Module,
    adapters: Sequence[str | Path],
    router: str = "arrow",
    *,
    mixing: str = "linear",
    complete: bool = True,
    **options: Any,
) -> Composition:
    """Read the adapters and decide what `compose` would make of them.

    Arguments and errors are `compose`'s; with `complete=False`, options that data will give may be
    missing.
    """
    composer: Composer = COMPOSERS.build(router, options)
    if mixing == "feed_forward":
        _check_networks(composer)
    loras, sites = read_loras(base_model, adapters)
    if complete:
        composer.check(base_model, loras, _mixed(base_model, sites, mixing))
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
        **trained_or_frozen(False),
        "target_modules": _targets(base_model, sites),
        "mixing": mixing,
        **composer.settings(loras),
    }
    if len(loras) == 1:  # nothing is chosen, so no loss would be formed
        settings["losses"] = {}
    config = MoloraConfig(**settings)
    if mixing == "feed_forward":
        _check_sum(config)
    return Composition(config, loras, sites, composer, ranks)


def _mixed(base_model: nn.Module, sites: Iterable[str], mixing: str) -> list[Site]:
    """The modules, or the networks around them, in the order in which they run."""
    modules = dict(base_model.named_modules())
    linears = [Site(s, None, *_get_in_out_features(modules[s])) for s in in_run_order(sites)]
    if mixing != "feed_forward":
        return linears
    return gather(linears, find_networks(modules), modules)


def _check_networks(composer: Composer) -> None:
    """Raise `ValueError` for a way to compose that can't decide for whole networks."""
    if composer.by_module:
        others = (name for name in COMPOSERS.names() if not COMPOSERS.get(name).by_module)
        raise ValueError(
            f"router={composer.name!r} knows something of each linear module, and nothing of a "
            f"whole feed-forward network; with mixing='feed_forward' use {', '.join(others)}."
        )


def _check_sum(config: MoloraConfig) -> None:
    """Raise `ValueError` for weights that would scale the base model's networks."""
    total = sum(config.gate_options["weights"]) if config.gate == "fixed" else 1.0
    if abs(total - 1) > 1e-6 or config.gate == "top_k_unnormalized":
        sums = f"to {total:g}" if config.gate == "fixed" else "to less than 1 with top_k"
        raise ValueError(
            f"the weights sum {sums}; with mixing='feed_forward' that scales the whole output of "
            "each network. Let them sum to 1."
        )


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


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))
