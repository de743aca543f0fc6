"""MoRA from its formula, in training and with its threshold at evaluation."""

from dataclasses import replace

import pytest
import torch

from molora import MoloraConfig

K = 3


def formula(site):
    values = site.x @ site.p["experts.A"].T
    scores = values / values.pow(2).sum(-1, keepdim=True).sqrt()
    weights = torch.zeros_like(scores)
    for t, row in enumerate(scores):
        best = row.topk(K).indices
        weights[t, best] = (row[best] / 0.3).softmax(-1)
    if not site.training:
        weights = weights * (scores >= 0.5)
        assert 0 < (weights > 0).double().mean() < K / scores.shape[1]
    y = (weights * values) @ site.p["experts.B"].T
    return site.base() + site.scaling[0] * y


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_formula(fidelity, train: bool):
    config = MoloraConfig.from_method(
        "mora",
        target_modules=["o_proj", "up_proj"],
        r=[6, 4],
        top_k=K,
        lora_dropout=0.0,
        gate_options={"temperature": 0.3, "threshold": 0.5},
    )
    case = fidelity(config)
    case.check(formula, train)
    scales = {layer.molora_allocation["default"].scaling[0] for layer in case.layers().values()}
    assert scales == {16 / 6, 16 / 4}  # alpha / r of the whole task, not of an atom


def test_atoms_of_an_earlier_task_compete_and_do_not_train(fidelity):
    config = MoloraConfig.from_method(
        "mora",
        target_modules=["o_proj", "up_proj"],
        num_experts=2,
        r=3,
        top_k=K,
        lora_dropout=0.0,
        gate_options={"temperature": 0.3, "threshold": 0.5},
        experts="frozen_lora",
        expert_options={"frozen": 3},
    )

    def of_both_tasks(site):
        A = torch.cat([site.p["experts.frozen_A"], site.p["experts.A"]])
        B = torch.cat([site.p["experts.frozen_B"], site.p["experts.B"]], dim=1)
        return formula(replace(site, p={"experts.A": A, "experts.B": B}))

    case = fidelity(config)
    case.check(of_both_tasks)
    assert {key.rpartition(".")[2] for key in case.run().gradients} == {"x", "A", "B"}


def test_a_token_below_the_threshold_everywhere_gets_the_base_output(fidelity):
    config = MoloraConfig.from_method(
        "mora", target_modules=["o_proj"], gate_options={"temperature": 0.3, "threshold": 2.0}
    )
    fidelity(config).check(lambda site: site.base(), train=False)
