"""MoGE from its formula: the likeliest experts of each group, raw probabilities."""

import pytest
import torch

from molora import MoloraConfig


def formula(site):
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    used = torch.zeros_like(probs)
    size = probs.shape[1] // 2
    for t, row in enumerate(probs.tolist()):
        for group in range(2):
            members = range(group * size, (group + 1) * size)
            for e in sorted(members, key=lambda e: -row[e])[:2]:
                used[t, e] = 1
    share = site.token_mean(used)
    balance = probs.shape[1] / share.sum() * (share * site.token_mean(probs)).sum()
    return site.mix(probs * used), {"load_balancing": balance}


def test_formula(fidelity):
    config = MoloraConfig.from_method(
        "moge", num_experts=[6, 8], r=[2, 3], top_k=4, gate_options={"groups": 2}
    )
    case = fidelity(config)
    case.check(formula)
    case.check(formula, train=False)


@pytest.mark.parametrize("wrong", [{"num_experts": 10}, {"top_k": 3}])
def test_groups_must_divide_experts_and_top_k(wrong):
    with pytest.raises(ValueError, match="groups=4.*multiple"):
        MoloraConfig.from_method("moge", **wrong)
