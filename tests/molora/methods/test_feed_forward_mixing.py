"""Mixing whole feed-forward outputs, from the formula: y = sum over e of w_e FFN_e(x)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from molora import MoloraConfig

TARGETS = ["o_proj", "gate_proj", "up_proj", "down_proj"]
ROUTED = {
    "num_experts": {"o_proj": 0, ".*": 4},
    "num_shared_experts": {"o_proj": 1, ".*": 0},
}


def config(**fields: Any) -> MoloraConfig:
    defaults = {"mixing": "feed_forward", "target_modules": TARGETS, "r": 2, **ROUTED}
    return MoloraConfig(**{**defaults, **fields})


def probabilities(site) -> Tensor:
    return (site.x @ site.p["router.weight"].T).softmax(-1)


def largest(probs: Tensor, k: int) -> Tensor:
    weights = torch.zeros_like(probs)
    for t, row in enumerate(probs):
        chosen = row.topk(k).indices
        weights[t, chosen] = row[chosen]
    return weights


def normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def reaching(probs: Tensor, p: float) -> Tensor:
    weights = torch.zeros_like(probs)
    for t, row in enumerate(probs):
        mass = 0.0
        for e in row.argsort(descending=True):
            weights[t, e] = row[e]
            mass += float(row[e].detach())
            if mass >= p:
                break
    return weights


def above(probs: Tensor, threshold: float) -> Tensor:
    return probs * (probs > threshold)


# name -> configuration, the routing weights of a site's probabilities
CASES = {
    "top-2": ({}, lambda p: normalized(largest(p, 2))),
    "top-1 by probability": ({"gate": "switch"}, lambda p: largest(p, 1)),
    "top-3 unnormalized": (
        {"gate": "top_k_unnormalized", "top_k": 3},
        lambda p: largest(p, 3),
    ),
    "as many as reach 0.6": (
        {"gate": "top_p", "gate_options": {"p": 0.6}},
        lambda p: reaching(p, 0.6),
    ),
    "all": ({"gate": "dense"}, lambda p: p),
    "unequal ranks": (
        {
            "r": [[1, 3, 2, 2]] * 2,
            "num_experts": 4,
            "num_shared_experts": 0,
            "target_modules": TARGETS[1:],
        },
        lambda p: normalized(largest(p, 2)),
    ),
    "ranks by module": (
        {"rank_pattern": {"up_proj": 3, "down_proj": 1}, "alpha_pattern": {"down_proj": 5}},
        lambda p: normalized(largest(p, 2)),
    ),
    "shared experts": (
        {"num_shared_experts": {"o_proj": 1, ".*": 2}, "shared_expert_rank": 3},
        lambda p: normalized(largest(p, 2)),
    ),
    "down projection alone": (
        {"target_modules": ["down_proj"], "num_experts": 4, "num_shared_experts": 0},
        lambda p: normalized(largest(p, 2)),
    ),
    "input projections alone": (
        {"target_modules": ["gate_proj", "up_proj"], "num_experts": 4, "num_shared_experts": 0},
        lambda p: normalized(largest(p, 2)),
    ),
}


@pytest.mark.parametrize("fields, weigh", CASES.values(), ids=CASES)
def test_formula(fidelity, fields, weigh):
    def formula(site):
        if not site.parts:
            return site.mix(site.x.new_zeros(len(site.x), 0))
        return site.mix_networks(weigh(probabilities(site)))

    fidelity(config(**fields)).check(formula)


ALL_ROUTED = {"num_experts": 4, "num_shared_experts": 0, "target_modules": TARGETS[1:]}


def test_a_token_without_experts_gets_the_base_network(fidelity):
    """Null experts may be all that a token chooses; its weights are zero then."""
    alone = []

    def formula(site):
        logits = site.x @ site.p["router.weight"].T
        chosen = largest(logits.exp(), 2)[:, :4] > 0
        weights = logits[:, :4].softmax(-1) * chosen
        alone.append(~chosen.any(-1))
        return site.mix_networks(weights / weights.sum(-1, keepdim=True).clamp_min(1e-300))

    case = fidelity(config(gate="null_experts", gate_options={"num_null": 4}, **ALL_ROUTED))
    case.check(formula)
    assert torch.cat(alone).any() and not torch.cat(alone).all()


def test_a_weight_of_zero_gets_its_gradient_where_the_gate_wants_it(fidelity):
    """DenseMixer: the router learns from the output of every expert."""

    def formula(site):
        probs = probabilities(site)
        chosen = largest(probs, 2)
        total = chosen.sum(-1, keepdim=True).detach()
        dense = sum(
            (probs[:, e, None] / total) * site.network(e).detach() for e in range(probs.shape[1])
        )
        return site.mix_networks((chosen / total).detach()) + dense - dense.detach()

    fidelity(config(gate="dense_gradient", **ALL_ROUTED)).check(formula)
