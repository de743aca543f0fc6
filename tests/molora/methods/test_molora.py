"""MoLoRA from its formula, and its initialisation."""

import pytest
import torch
from peft import get_peft_model

from molora import MoloraConfig


def formula(site):
    y = site.base()
    powers = (site.x @ site.p["router.weight"].T).exp()
    A, B = site.experts()
    for e in range(len(A)):
        weight = powers[:, e : e + 1] / powers.sum(-1, keepdim=True)
        y = y + weight * 16 / len(A[e]) * (site.x @ A[e].T @ B[e].T)
    return y


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("molora", num_experts=[3, 4], r=[2, 3]))
    case.check(formula)
    case.check(formula, train=False)


def test_initialisation(tiny_model):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), MoloraConfig.from_method("molora"))
    named = dict(model.named_parameters())
    for kind in ("experts.default.A", "router.default.weight"):
        values = torch.cat([p.flatten() for name, p in named.items() if name.endswith(kind)])
        assert values.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(not p.any() for name, p in named.items() if name.endswith("experts.default.B"))
