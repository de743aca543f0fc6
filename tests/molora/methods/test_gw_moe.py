"""GW-MoE from its formula: undecided tokens use every expert in training only."""

import math

import torch

from molora import MoloraConfig, SiteInput
from molora.gates import GATES

THRESHOLD = 0.8  # of the largest entropy; the random tokens lie on both sides of it


def formula(site):
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    rows = []
    for t, row in enumerate(probs.tolist()):
        best = sorted(range(len(row)), key=lambda e: -row[e])[:2]
        kept = torch.zeros_like(probs[t])
        kept[best] = 1
        entropy = -sum(p * math.log(p) for p in row)
        undecided = site.training and entropy >= THRESHOLD * math.log(len(row))
        rows.append(probs[t] if undecided else probs[t] * kept / sum(probs[t, best]))
    weights = torch.stack(rows)
    share = site.token_mean((weights != 0).double())
    balance = probs.shape[1] / share.sum() * (share * site.token_mean(probs)).sum()
    return site.mix(weights), {"load_balancing": balance}


def test_formula(fidelity):
    config = MoloraConfig.from_method(
        "gw-moe", num_experts=[5, 4], r=[2, 3], gate_options={"entropy": THRESHOLD}
    )
    case = fidelity(config)
    case.check(formula)
    case.check(formula, train=False)


def test_both_kinds_of_token_occur_in_training():
    gate = GATES.build(
        "global_workspace", {"entropy": THRESHOLD}, num_experts=4, top_k=2, in_features=3
    )
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    inputs = SiteInput(torch.zeros(2, 3))
    assert gate.train()(logits, inputs).selected.sum(-1).tolist() == [4, 2]
    assert gate.eval()(logits, inputs).selected.sum(-1).tolist() == [2, 2]
