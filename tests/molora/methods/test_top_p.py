"""Top-p routing from its formula, with the entropy loss."""

import math

import torch

from molora import MoloraConfig


def formula(site):
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    used = torch.zeros_like(probs)
    for t, row in enumerate(probs.tolist()):
        total = 0.0
        for e in sorted(range(len(row)), key=lambda e: -row[e]):
            if total < 0.4:
                used[t, e] = 1
                total += row[e]
    share = site.token_mean(used)
    balance = probs.shape[1] / share.sum() * (share * site.token_mean(probs)).sum()
    entropy = site.token_mean(-(probs * probs.log()).sum(-1)) / math.log(probs.shape[1])
    return site.mix(probs * used), {"load_balancing": balance, "tsallis_entropy": entropy}


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("top-p", num_experts=[5, 4], r=[2, 3]))
    case.check(formula)
    case.check(formula, train=False)
