"""From a configuration and a model's sites to what each site gets. Pure: nothing is created."""

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from .config import MoloraConfig
from .config_checks import check_top_k
from .gates import GATES
from .settings import matches, resolve_setting
from .sites import Site, block_of, reads_encoder


@dataclass(frozen=True)
class SiteAllocation:
    """What one site gets, by itself and (the last four fields) among the others.

    Attributes:
        site: the module.
        ranks: rank of each routed expert; empty when nothing is routed. An expert of a feed-forward
            network has the ranks of its parts added up.
        shared_ranks: rank of each expert that is always on.
        scaling: factor of each routed, then of each shared expert; a feed-forward network's is in
            its parts.
        top_k: experts of a token, K; None where it varies or nothing is routed.
        parts: what the adapted linear modules of a feed-forward network get; else none.
        router_site: name of the site whose router decides here, its own or another's; None when
            nothing is routed.
        num_decisions: routing decisions in the whole model, over which losses are averaged.
        alike: names of the sites of the same module name, sizes and ranks, this one included: those
            that may share parameters.
        depth: the share of the model's layers that ends with the site's; 1 for one in no layer.
    """

    site: Site
    ranks: tuple[int, ...]
    shared_ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    top_k: int | None
    parts: tuple["SiteAllocation", ...] = ()
    router_site: str | None = None
    num_decisions: int = 0
    alike: tuple[str, ...] = ()
    depth: float = 1.0

    @property
    def total_rank(self) -> int:
        """R: the ranks of all experts, shared ones included."""
        return sum(self.ranks) + sum(self.shared_ranks)

    @property
    def is_routed(self) -> bool:
        return bool(self.ranks)

    @property
    def owns_router(self) -> bool:
        return self.router_site == self.site.name


def allocate(
    config: MoloraConfig, sites: Iterable[Site], num_layers: int
) -> dict[str, SiteAllocation]:
    """Decide for each site: experts, ranks, K, scaling, and whose router it follows.

    Args:
        config: a valid configuration.
        sites: the sites in the order of the model. A feed-forward network that gets no routed
            experts isn't one: its linear modules are.
        num_layers: layers of the model, which lists in the configuration must match.

    Returns:
        One allocation per site, by name, in the same order.

    Raises:
        ValueError: a per-layer setting doesn't fit the model, or sites that would share a router
            don't have equal numbers of experts.
    """
    plans = {plan.site.name: plan for site in sites for plan in _plans(config, site, num_layers)}
    leaders: dict[str, str] = {}
    groups: dict[Hashable, list[str]] = {}
    for plan in plans.values():
        if plan.is_routed:
            leaders.setdefault(_scope_key(config, plan.site), plan.site.name)
        for member in (plan, *plan.parts):
            groups.setdefault(_kind(member), []).append(member.site.name)

    def placed(plan: SiteAllocation, leader: str | None) -> SiteAllocation:
        return replace(
            plan,
            parts=tuple(placed(part, leader) for part in plan.parts),
            router_site=leader,
            num_decisions=len(leaders),
            alike=tuple(groups[_kind(plan)]),
            depth=1.0 if plan.site.layer is None else (plan.site.layer + 1) / num_layers,
        )

    allocations = {}
    for name, plan in plans.items():
        leader = leaders[_scope_key(config, plan.site)] if plan.is_routed else None
        if leader is not None:
            _check_same_decision(config, plan, plans[leader])
        allocations[name] = placed(plan, leader)
    return allocations


def _plans(config: MoloraConfig, site: Site, num_layers: int) -> list[SiteAllocation]:
    """What a site gets by itself, or its parts do where it is a network and nothing is routed."""
    if not site.parts:
        return [_plan(config, site, num_layers)]
    parts = [_plan(config, part, num_layers) for part in site.parts]
    if not any(part.is_routed for part in parts):
        return parts
    for part in parts:
        counts = [(len(p.ranks), len(p.shared_ranks), p.top_k) for p in (parts[0], part)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"mixing='feed_forward': an expert of {site.name!r} adapts each of its linear "
                f"modules, but {parts[0].site.name!r} and {part.site.name!r} have {counts[0][0]} "
                f"and {counts[1][0]} experts, {counts[0][1]} and {counts[1][1]} shared ones, with "
                f"top_k {counts[0][2]} and {counts[1][2]}; give them equal numbers."
            )
    ranks, shared_ranks = (
        tuple(map(sum, zip(*every, strict=True)))
        for every in ([p.ranks for p in parts], [p.shared_ranks for p in parts])
    )
    return [SiteAllocation(site, ranks, shared_ranks, (), parts[0].top_k, tuple(parts))]


def _kind(plan: SiteAllocation) -> Hashable:
    site = plan.site
    return site.module, site.in_features, site.out_features, plan.ranks, plan.shared_ranks


def _plan(config: MoloraConfig, site: Site, num_layers: int) -> SiteAllocation:
    def setting(field: str) -> Any:
        value = getattr(config, field)
        return resolve_setting(field, value, site.name, site.layer, num_layers)

    num_experts = setting("num_experts")
    num_shared = setting("num_shared_experts")
    rank = _pattern(config.rank_pattern, site.name, setting("r"))
    if isinstance(rank, list | tuple):
        if len(rank) != num_experts:
            raise ValueError(
                f"r={list(rank)} gives {len(rank)} ranks for the {num_experts} experts of the site "
                f"{site.name!r}; give one rank for each expert, or one for all."
            )
        ranks = tuple(rank)
    else:
        ranks = (rank,) * num_experts
    if not ranks and not num_shared:
        raise ValueError(f"the site {site.name!r} would get no expert at all; exclude it instead.")
    if ranks and GATES.get(config.gate).weighs_shared_expert and num_shared != 1:
        raise ValueError(
            f"gate={config.gate!r} weighs one shared expert against the routed ones, but the site "
            f"{site.name!r} has num_shared_experts={num_shared}; set it to 1."
        )
    shared_rank = config.shared_expert_rank or _first_rank(rank)
    alpha = float(_pattern(config.alpha_pattern, site.name, config.lora_alpha))
    scaling = tuple(_scaling(config.scaling_rule, alpha, r) for r in ranks)
    if config.rank_wise:
        scaling = tuple(s for s, r in zip(scaling, ranks, strict=True) for _ in range(r))
        ranks = (1,) * sum(ranks)
    shared_ranks = (shared_rank,) * num_shared
    scaling += tuple(_scaling(config.scaling_rule, alpha, r) for r in shared_ranks)
    if len(ranks) == 1 and _constant_for_one_expert(config):
        # Its weight would be 1 whatever the router says: always on, and no router is made.
        return SiteAllocation(site, (), ranks + shared_ranks, scaling, None)
    top_k = None
    if ranks:
        top_k = _top_k(config, site, len(ranks), setting("top_k"))
    return SiteAllocation(site, ranks, shared_ranks, scaling, top_k)


def _top_k(config: MoloraConfig, site: Site, num_experts: int, chosen: int | None) -> int | None:
    gate = GATES.get(config.gate)
    if not gate.takes_top_k:
        return None if gate.sparse else num_experts
    if chosen is None:
        return min(gate.default_top_k or num_experts, num_experts)
    check_top_k(config.gate, chosen, num_experts, f" at the site {site.name!r}")
    return chosen


def _constant_for_one_expert(config: MoloraConfig) -> bool:
    options = config.gate_options
    gate = GATES.build(config.gate, options, num_experts=1, top_k=1, in_features=1)
    return gate.constant_for_one_expert


def _first_rank(rank: int | list[int] | tuple[int, ...]) -> int:
    return rank if isinstance(rank, int) else rank[0]


def _pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def _scaling(rule: str, alpha: float, rank: int) -> float:
    if rule == "alpha/r":
        return alpha / rank
    return alpha / math.sqrt(rank) if rule == "alpha/sqrt(r)" else alpha


def _scope_key(config: MoloraConfig, site: Site) -> str:
    if config.router_scope == "site":
        return site.name
    if config.router_scope == "block":
        return block_of(site.name)
    if config.router_scope == "model":
        return "model"
    if site.layer is None:
        raise ValueError(
            f"router_scope='layer', but the site {site.name!r} is in no numbered layer; exclude it "
            "(exclude_modules) or use router_scope='site'."
        )
    # Keys and values of cross-attention are other tokens than the rest of their layer.
    return f"layer {site.layer}{' from the encoder' if reads_encoder(site.name) else ''}"


def _check_same_decision(
    config: MoloraConfig, plan: SiteAllocation, leader: SiteAllocation
) -> None:
    if len(plan.ranks) != len(leader.ranks) or plan.top_k != leader.top_k:
        raise ValueError(
            f"router_scope={config.router_scope!r} makes {plan.site.name!r} follow the decision of "
            f"{leader.site.name!r}, but they have {len(plan.ranks)} and {len(leader.ranks)} "
            f"experts with top_k {plan.top_k} and {leader.top_k}; give them equal numbers."
        )
    if config.router_scope == "block" and plan.site.in_features != leader.site.in_features:
        raise ValueError(
            f"router_scope='block' takes {plan.site.name!r} and {leader.site.name!r} to read the "
            f"same input, but their inputs have {plan.site.in_features} and "
            f"{leader.site.in_features} features; use router_scope='site'."
        )
