"""The modules of one site, built from its allocation."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .allocation import SiteAllocation
from .config import MoloraConfig
from .experts import EXPERTS, Experts, SiteSpec
from .feedforward_experts import FeedForwardExperts
from .gates import GATES, Gate
from .routers import ROUTERS, Router


def build_experts(config: MoloraConfig, allocation: SiteAllocation) -> Experts:
    """The site's experts, not yet initialised."""
    gate = GATES.get(config.gate)
    if allocation.parts:
        parts = {p.site.module: build_experts(config, p) for p in allocation.parts}
        omits = gate.omits_zeros or gate.at_most_top_k
        return FeedForwardExperts(
            parts,
            features=(allocation.site.in_features, allocation.site.out_features),
            slots=allocation.top_k if omits else len(allocation.ranks),
            keep_zeros=not omits,
        )
    experts: Experts = EXPERTS.build(
        config.experts,
        config.expert_options,
        spec=SiteSpec(
            allocation.site.in_features,
            allocation.site.out_features,
            allocation.ranks,
            allocation.shared_ranks,
            allocation.scaling,
            config.lora_dropout,
            sites=len(allocation.alike),
            position=allocation.alike.index(allocation.site.name),
            module=allocation.site.module,
        ),
    )
    if gate.at_most_top_k:
        experts.active = allocation.top_k
    return experts


def build_router(config: MoloraConfig, allocation: SiteAllocation, num_logits: int) -> Router:
    """The router of a site that owns one, with the logits its gate reads; not yet initialised."""
    router = ROUTERS.get(config.router)
    features = allocation.site.in_features
    if router.reads_output:
        features = allocation.site.out_features
    elif router.reads_inner:
        features = allocation.ranks[0]
    given = {"depth": allocation.depth} if router.reads_depth else {}
    return ROUTERS.build(
        config.router,
        config.router_options,
        in_features=features,
        num_experts=num_logits,
        **given,
    )


def build_gate(config: MoloraConfig, allocation: SiteAllocation) -> Gate:
    """The gate that goes with that router."""
    return GATES.build(
        config.gate,
        config.gate_options,
        num_experts=len(allocation.ranks),
        top_k=allocation.top_k,
        in_features=allocation.site.in_features,
    )


def check_parts(config: MoloraConfig, allocations: Iterable[SiteAllocation]) -> None:
    """Raise what a part of any site refuses, also of the others, before any is built in earnest.

    Built on the meta device, they take no memory and draw no random numbers.
    """
    losses = [loss for _, loss in config.build_losses().values()]
    with torch.device("meta"):
        for allocation in allocations:
            experts = build_experts(config, allocation)
            constant_weights(config, allocation)
            if not allocation.owns_router:
                continue
            gate = build_gate(config, allocation)
            router = build_router(config, allocation, gate.num_logits)
            router.check_fit(gate, experts)
            gate.check_fit(router, experts)
            for loss in losses:
                loss.check_fit(router, experts)


def constant_weights(config: MoloraConfig, allocation: SiteAllocation) -> Tensor | None:
    """(E,) routing weights that the gate gives every token at inference; None where it decides."""
    if not allocation.is_routed or not GATES.get(config.gate).constant:
        return None
    return build_gate(config, allocation).constant_weights()
