"""LoRAMoE from its formula, localized balancing included."""

import pytest
import torch
from peft import get_peft_model

from molora import MoloraConfig

DELTA = 0.3


def formula(site):
    weights = (site.x @ site.p["router.weight"].T).softmax(-1)
    experts = weights.shape[1]
    values = []
    for b, rows in enumerate(weights.unflatten(0, site.shape)):
        real = site.mask.view(site.shape)[b]
        for e in range(experts):
            own = (e >= experts // 2) == (site.labels["task_ids"][b] == 1)
            values.append((1 + DELTA if own else 1 - DELTA) * rows[real, e].mean())
    values = torch.stack(values)
    loss = values.var() / values.mean() ** 2
    return site.mix(weights), {"localized_balancing": loss}


def config(**overrides) -> MoloraConfig:
    loss = {"localized_balancing": {"coefficient": 0.6, "delta": DELTA}}
    options = {"num_experts": [2, 4], "r": [3, 2], "lora_dropout": 0.0, "losses": loss}
    return MoloraConfig.from_method("loramoe", **{**options, **overrides})


def test_formula(fidelity):
    case = fidelity(config())
    case.check(formula, tolerance=1e-8)  # of the 1e-10 beside the squared mean


def test_without_task_ids_it_says_what_to_pass(tiny_model, tiny_batch):
    model = get_peft_model(tiny_model("llama"), config()).train()
    with pytest.raises(ValueError, match="molora.RoutingLabelCollator"):
        model(**tiny_batch("llama"))
    with pytest.raises(ValueError, match=r"task_ids has the shape \(3,\).* holds 2 samples"):
        model(**tiny_batch("llama"), routing_task_ids=torch.tensor([0, 1, 0]))
    model(**tiny_batch("llama"), routing_task_ids=torch.tensor([0, 1]))


def test_experts_must_divide_into_groups(tiny_model):
    with pytest.raises(ValueError, match="num_groups=2 equal blocks, which 3 experts"):
        get_peft_model(tiny_model("llama"), config(num_experts=3))
