"""AdaMoE-VLA from its formula, and where it starts."""

import torch

from molora import MoloraConfig
from molora.gates import GATES
from molora.routing import SiteInput


def formula(site):
    logits = site.x @ site.p["router.weight"].T
    used = torch.eye(logits.shape[1], dtype=torch.float64)[logits.argmax(-1)]
    weights = logits.softmax(-1) + site.x @ site.p["gate.scale"].T
    z_loss = site.token_mean(logits.exp().sum(-1).log() ** 2)
    return site.mix(weights * used), {"z_loss": z_loss}


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("adamoe-vla", num_experts=[3, 4], r=[2, 3]))
    case.check(formula)
    case.check(formula, train=False)


def test_it_starts_as_top_k_without_renormalisation():
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    inputs = SiteInput(hidden=torch.randn(9, 5))
    fields = {"num_experts": 4, "top_k": 2, "in_features": 5}
    ours = GATES.build("decoupled", {}, **fields)(logits, inputs)
    theirs = GATES.build("top_k_unnormalized", {}, **fields)(logits, inputs)
    assert torch.equal(ours.weights, theirs.weights)
