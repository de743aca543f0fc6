"""Awaker from its formula, noise included."""

import pytest
import torch
from peft import get_peft_model

from molora import MoloraConfig


def formula(site):
    logits = site.x @ site.p["router.weight"].T
    if site.training:
        logits = logits + 0.1 * torch.randn_like(logits)
    largest, first = logits.softmax(-1).max(-1, keepdim=True)
    weights = torch.zeros_like(logits).scatter(1, first, largest)
    *routed, shared = site.outputs()
    y = site.base() + (1 - largest) * shared
    for e, output in enumerate(routed):
        y = y + weights[:, e, None] * output
    importance = weights[site.mask].sum(0)
    loss = ((importance - importance.mean()) ** 2).mean() / importance.mean() ** 2
    return y, {"importance_cv": loss}


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("awaker", num_experts=[3, 4], r=[2, 3]))
    case.check(formula, tolerance=1e-8)  # of the 1e-10 beside the squared mean
    case.check(formula, train=False)


def test_it_weighs_exactly_one_shared_expert(tiny_model):
    config = MoloraConfig.from_method("awaker", num_shared_experts=2)
    with pytest.raises(ValueError, match="num_shared_experts=2; set it to 1"):
        get_peft_model(tiny_model("llama"), config)
