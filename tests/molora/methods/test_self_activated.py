"""Autonomy of Experts on LoRA, from its formula."""

import pytest
import torch

from molora import MoloraConfig


def formula(site, by_factor: bool):
    A, _ = site.experts()
    scores = torch.stack([(site.x @ a.T).pow(2).sum(-1).sqrt() for a in A], -1)
    if by_factor:
        scores = scores / torch.stack([a.pow(2).sum().sqrt() for a in A])
    weights = torch.zeros_like(scores)
    for t, row in enumerate(scores):
        best = row.topk(2).indices
        weights[t, best] = row[best].softmax(-1)
    share, probs = site.token_mean((weights > 0).double()) / 2, scores.softmax(-1)
    balance = scores.shape[1] * (share * site.token_mean(probs)).sum()
    return site.mix(weights), {"load_balancing": balance}


@pytest.mark.parametrize("normalize", ["none", "factor"])
@pytest.mark.parametrize("r", [[2, 3], [[1, 3, 2], [2, 4, 1]]], ids=["equal", "unequal"])
def test_formula(fidelity, r, normalize: str):
    config = MoloraConfig.from_method(
        "self-activated",
        num_experts=3,
        r=r,
        router_options={"score": "norm", "normalize": normalize},
    )
    fidelity(config).check(lambda site: formula(site, normalize == "factor"))


def test_signed_scores_need_experts_of_rank_1(fidelity):
    config = MoloraConfig.from_method("self-activated", r=2, router_options={"score": "signed"})
    with pytest.raises(ValueError, match=r"needs experts of rank 1, not \[2, 2"):
        fidelity(config).run()


@pytest.mark.parametrize("option", ["score", "normalize"])
def test_unknown_options_are_refused(option: str):
    with pytest.raises(ValueError, match=f"unknown router option {option} 'sine'; known: "):
        MoloraConfig.from_method("self-activated", router_options={option: "sine"})
