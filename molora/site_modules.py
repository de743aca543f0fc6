"""The modules of one site, built from its allocation."""

from .allocation import SiteAllocation
from .config import MoloraConfig
from .experts import EXPERTS, Experts, SiteSpec
from .gates import GATES, Gate
from .routers import ROUTERS, Router


def build_experts(config: MoloraConfig, allocation: SiteAllocation) -> Experts:
    """The site's experts, not yet initialised."""
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
        ),
    )
    if GATES.get(config.gate).at_most_top_k:
        experts.active = allocation.top_k
    return experts


def build_router(config: MoloraConfig, allocation: SiteAllocation, num_logits: int) -> Router:
    """The router of a site that owns one, with the logits its gate reads; not yet initialised."""
    return ROUTERS.build(
        config.router,
        config.router_options,
        in_features=allocation.site.in_features,
        num_experts=num_logits,
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
