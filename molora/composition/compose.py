"""Saved LoRA adapters as the experts of one mixture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ..feedforward_experts import FeedForwardExperts
from ..layer import MoloraLayer, adapted_layers
from .plan import Composition, plan_composition


def compose(
    base_model: nn.Module,
    adapters: Sequence[str | Path],
    router: str = "arrow",
    *,
    mixing: str = "linear",
    adapter_name: str = "default",
    **options: Any,
) -> PeftModel:
    """Make one mixture of saved LoRA adapters, which become its frozen experts.

        model = molora.compose(base, ["sql", "chat", "maths"], router="arrow")
        model.save_pretrained("mixture")  # PeftModel.from_pretrained(base, "mixture") loads it

    The adapters may differ in rank, alpha, rsLoRA and targets: their scaling goes into B, and an
    adapter that doesn't target a module has a zero expert of rank 1 there, which "arrow",
    "phatgoose" and "dume" never choose.

    What the adapters are weighed by, and the options with their defaults:

    - "arrow" (top_k=3): the directions that they amplify most.
    - "phatgoose" (gates, top_k=2): gates trained with them, by `fit_gates`.
    - "glider" (gates, prior_scale=100, descriptions, top_k=2): these, and a preference by request.
    - "dume" (gates, top_k=2, temperature=0.1): a regression on their data, by `fit_ridge`.
    - "static" (weights=1/E each): the same for every token, so that `merge_and_unload` is exact;
      `fit_weights` fits them to a few examples.
    - "ttmm" (centroids, beta=0.2, threshold=0.01, most=50, source="tokens", first=50,
      pool="prompt"): how near the prompt is to their data, by `fit_centroids`.

    Or a router that starts at random. Train it before use, with any trainer; the adapters stay:

    - "linear" (top_k=2): top-k of a linear map at each module.
    - "lora-mixer" (top_k=3, coefficient=0.01, entropy_weight=0.1, train_experts=False): softly
      over all in training, over `top_k` at inference, with a loss.
    - "mole" (balance=0.5, router_scope="layer", pool="prompt"): a gate for each layer, with a loss.
    - "x-lora" (hidden_size, top_k, train_experts=False): a first pass of the base model.

    Args:
        base_model: the model that the adapters were trained on; it is changed in place.
        adapters: their folders or Hub names.
        router: one of these.
        mixing: "linear", or "feed_forward" (FlexMoRE): the outputs of whole feed-forward networks
            are mixed, each with one adapter at work in it. Not for the routers that judge by
            module, "arrow", "dume", "glider" and "phatgoose"; the weights must sum to 1.
        adapter_name: the mixture's name.
        options: the router's; the classes of `molora.composition`, such as `XLora`, describe them.
            All but "static" and "ttmm" take a `temperature`; `weights`, `gates`, `centroids` and
            `descriptions` have an entry for each adapter.

    Returns:
        The base model with the mixture as its adapter, in evaluation mode.

    Raises:
        ValueError: an adapter isn't plain LoRA of this base model; an option is wrong or missing.
    """
    plan = plan_composition(base_model, adapters, router, mixing=mixing, **options)
    model = get_peft_model(base_model, plan.config, adapter_name=adapter_name)
    _fill(adapted_layers(model, adapter_name), adapter_name, plan)
    return model.eval()


@torch.no_grad()
def _fill(layers: Mapping[str, MoloraLayer], adapter_name: str, plan: Composition) -> None:
    """Write the adapters' factors, and what the routers know of them, into each site."""
    filled: list[str] = []
    for site, layer in layers.items():
        experts = layer.molora_experts[adapter_name]
        parts = {site: experts}
        if isinstance(experts, FeedForwardExperts):
            parts = {f"{site}.{linear}": part for linear, part in experts.linears.items()}
        for name, part in parts.items():
            _fill_experts(part, name, plan)
        router: Any = dict(layer.molora_router.items()).get(adapter_name)
        if router is not None:  # none is made where one expert is always on
            plan.composer.fill(router, site, plan.adapters)
        filled += parts
    assert sorted(filled) == sorted(plan.sites), "every module was named in full"


def _fill_experts(experts: Any, name: str, plan: Composition) -> None:
    zero = torch.zeros(1, experts.in_features), torch.zeros(experts.out_features, 1)
    pairs = [adapter.factors.get(name, zero) for adapter in plan.adapters]
    experts.A.copy_(torch.cat([A for A, _ in pairs]))
    experts.B.copy_(torch.cat([B for _, B in pairs], dim=1))
