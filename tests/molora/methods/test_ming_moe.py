"""MING-MOE from its formula."""

import torch

from molora import MoloraConfig


def formula(site):
    logits = site.x @ site.p["router.weight"].T + site.p["router.bias"]
    weights = torch.zeros_like(logits)
    for t, row in enumerate(logits):  # the softmax over the two selected logits
        chosen = row.topk(2).indices
        weights[t, chosen] = row[chosen].softmax(-1)
    return site.mix(weights)


def test_formula(fidelity):
    fidelity(MoloraConfig.from_method("ming-moe", num_experts=[4, 3], r=[3, 2])).check(formula)
