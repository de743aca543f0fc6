"""The random router against top-2 by its fixed matrix."""

import torch
from peft import get_peft_model

from molora import MoloraConfig


def formula(site):
    probs = (site.x @ site.buffers["router.weight"].T).softmax(-1)
    used = torch.zeros_like(probs).scatter(1, probs.topk(2).indices, 1.0)
    return site.mix(used * probs / (used * probs).sum(-1, keepdim=True))


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("random", num_experts=[3, 4], r=[2, 3]))
    case.check(formula)
    case.check(formula, train=False)


def test_the_router_has_nothing_to_train(tiny_model):
    model = get_peft_model(tiny_model("llama"), MoloraConfig.from_method("random"))
    assert not any("router" in name for name, _ in model.named_parameters())
    weights = [b for name, b in model.named_buffers() if name.endswith("router.default.weight")]
    assert len(weights) == 14
    assert all(weight.std() > 0 for weight in weights)
