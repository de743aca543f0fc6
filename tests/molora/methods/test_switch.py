"""Switch from its formula, jitter included."""

import torch

from molora import MoloraConfig


def formula(site):
    x = site.x
    if site.training:
        x = x * torch.empty_like(x).uniform_(0.99, 1.01)
    probs = (x @ site.p["router.weight"].T).softmax(-1)
    used = torch.eye(probs.shape[1], dtype=torch.float64)[probs.argmax(-1)]
    loss = probs.shape[1] * (site.token_mean(used) * site.token_mean(probs)).sum()
    return site.mix(probs * used), {"load_balancing": loss}


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("switch", num_experts=[3, 4], r=[2, 3]))
    case.check(formula)
    case.check(formula, train=False)
