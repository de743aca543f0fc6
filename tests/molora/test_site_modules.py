"""What the operator may leave out: experts that a token doesn't use and no gradient needs."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from molora import MoloraConfig, SiteInput, ops
from molora.gates import GATES
from molora.routers import ROUTERS


def layer_with(**settings):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5)),
        MoloraConfig(target_modules=["0"], init_lora_weights=False, **settings),
    )
    return model.base_model.model[0]


@pytest.mark.parametrize(
    ("gate", "active"),
    [
        ("top_k", 2),
        ("sigmoid", 2),
        ("switch", 1),
        ("grouped_top_k", 2),
        ("dense", None),
        ("top_p", None),
        ("dense_gradient", None),  # its router learns from the experts that aren't used
        ("global_workspace", None),  # some tokens use all experts
    ],
)
def test_the_experts_know_how_many_a_token_uses(gate, active):
    assert layer_with(gate=gate, num_experts=4, r=2).molora_experts["default"].active == active


def test_the_operator_is_told(monkeypatch):
    seen = []
    real = ops.routed_lora
    monkeypatch.setattr(
        ops, "routed_lora", lambda *a, **k: seen.append(k["active"]) or real(*a, **k)
    )
    layer_with(num_experts=4, r=2)(torch.randn(3, 6))
    layer_with(num_experts=1, r=2)(torch.randn(3, 6))  # nothing is routed
    assert seen == [2, None]


@pytest.mark.parametrize("gate", [n for n in GATES.names() if GATES.get(n).at_most_top_k])
def test_what_may_be_left_out_has_no_weight_and_takes_no_gradient(gate):
    """By the definition of the attribute: the gradient of an unused weight reaches no logit."""
    layer = layer_with(gate=gate, num_experts=4, r=2).double().eval()
    module = layer.molora_gate["default"]
    logits = torch.randn(50, module.num_logits, dtype=torch.float64, requires_grad=True)
    weights = module(logits, SiteInput(torch.zeros(50, 6, dtype=torch.float64))).weights
    assert (weights != 0).sum(-1).max() <= layer.molora_experts["default"].active
    unused = weights[weights == 0].sum()
    (grad,) = torch.autograd.grad(unused, logits)
    assert grad.abs().max() == 0


@pytest.mark.parametrize("gate", GATES.names())
def test_a_gate_leaves_what_it_says(gate):
    """By the definition of the attribute: the extras of a decision in training."""
    options = {"fixed": {"weights": [1.0, 0.5, 0.2, 0.1]}}.get(gate, {})
    top_k = GATES.get(gate).fixed_top_k or GATES.get(gate).default_top_k
    module = GATES.build(gate, options, num_experts=4, top_k=top_k, in_features=6).train()
    router = ROUTERS.build("linear", {}, in_features=6, num_experts=4)
    inputs = SiteInput(torch.randn(10, 6), shape=(2, 5), router=router)
    assert module(torch.randn(10, module.num_logits), inputs).extras.keys() == set(module.leaves)
