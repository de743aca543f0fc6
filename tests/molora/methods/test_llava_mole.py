"""LLaVA-MoLE from its formula: one decision per feed-forward part, plain LoRA beside it."""

import pytest
import torch

from molora import MoloraConfig


def formula(site):
    if site.name.endswith("o_proj"):
        return site.base() + site.outputs()[0]
    terms = {}
    if site.name.endswith("gate_proj"):  # the first to read the input of the feed-forward part
        logits = site.x @ site.p["router.weight"].T + site.p["router.bias"]
        used = torch.eye(3, dtype=torch.float64)[logits.argmax(-1)]
        site.memory[site.layer] = used
        probs = logits.softmax(-1)
        balance = (site.token_mean(used) * site.token_mean(probs)).sum()
        terms = {"load_balancing": 3 * balance}
    return site.mix(site.memory[site.layer]), terms


def config(**overrides) -> MoloraConfig:
    options = {"r": [2, 3], "lora_dropout": 0.0}
    return MoloraConfig.from_method("llava-mole", **{**options, **overrides})


def test_formula(fidelity):
    case = fidelity(config())
    case.check(formula)
    case.check(formula, train=False)


def test_the_task_gives_the_router_no_gradient(fidelity):
    case = fidelity(config())
    gradients = case.run(train=False).gradients
    routers = {name: grad for name, grad in gradients.items() if "router" in name}
    assert len(routers) == 4
    assert all(grad is None for grad in routers.values())


def test_a_router_that_nothing_would_train_is_refused():
    with pytest.raises(ValueError, match="no loss to train it"):
        config(losses={})
