"""MoSLD from its formula, in both readings of its paper."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

from molora import MoloraConfig
from molora.experts import EXPERTS, SiteSpec


def formula(site):
    A, B, r = site.p["experts.A"], site.p["experts.B"], site.ranks[0]
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    chosen = F.one_hot(probs.topk(2).indices, probs.shape[1]).sum(1)
    weights = probs * chosen / (probs * chosen).sum(-1, keepdim=True)
    y = site.base()
    shared = A if A.shape[0] == r else B
    if site.training:
        shared = shared * F.dropout(torch.ones_like(shared), 0.4)
    for e, weight in enumerate(weights.unbind(-1)):
        block = slice(r * e, r * (e + 1))
        if A.shape[0] == r:
            output = site.x @ shared.T @ B[:, block].T
        else:
            output = site.x @ A[block].T @ shared.T
        y = y + (16 / r) * weight[:, None] * output
    share, mass = site.token_mean(chosen.double()) / 2, site.token_mean(probs)
    return y, {"load_balancing": probs.shape[1] * (share * mass).sum()}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("experts", ["shared_a", "shared_b"])
def test_formula(fidelity, experts: str, train: bool):
    config = MoloraConfig.from_method(
        "mosld",
        target_modules=["o_proj", "down_proj"],
        experts=experts,
        expert_options={"drop_connect": 0.4},
        num_experts=[4, 3],
        r=[2, 3],
    )
    fidelity(config).check(formula, train)


@pytest.mark.parametrize(("experts", "zero"), [("shared_a", "B"), ("shared_b", "A")])
def test_the_experts_own_factors_start_at_zero(experts: str, zero: str, tiny_model):
    config = MoloraConfig.from_method("mosld", experts=experts, num_experts=4)
    model = get_peft_model(tiny_model("llama"), config)
    factors = [(n[-1], p) for n, p in model.named_parameters() if ".molora_experts." in n]
    assert len(factors) == 8
    for name, factor in factors:
        assert (factor == 0).all() if name == zero else (factor != 0).all()


def test_a_shared_factor_needs_one_rank():
    with pytest.raises(ValueError, match=r"one rank for all, not \(1, 2\)"):
        EXPERTS.build("shared_a", {}, spec=SiteSpec(4, 4, (1, 2), (), (1.0, 1.0)))
