"""DS-MoE from its formula, dense in training and cut at inference."""

import math

import torch

from molora import MoloraConfig


def formula(site):
    memory = site.memory
    if site.name.endswith("up_proj"):
        return site.mix(memory["block"])
    p = (site.x @ site.p["router.weight"].T).softmax(-1)
    experts = p.shape[1]
    weights = p
    if not site.training:
        weights = torch.zeros_like(p)
        for t, row in enumerate(p.tolist()):
            for e in sorted(range(experts), key=row.__getitem__)[-2:]:
                weights[t, e] = p[t, e]
    memory["block"] = weights
    mean = site.token_mean(p)
    within = site.token_mean(-(p * p.log()).sum(-1))
    loss = (within + (mean * mean.log()).sum()) / math.log(experts)
    return site.mix(weights), {"mutual_information": loss}


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("ds-moe", num_experts=[3, 4], r=2))
    case.check(formula)
    case.check(formula, train=False)
