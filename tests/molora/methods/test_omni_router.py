"""Omni-router from its formula, and what is shared."""

import torch

from molora import MoloraConfig


def formula(site):
    module = site.name.rpartition(".")[2]
    if module == "up_proj":
        return site.mix(site.memory["block"])
    W = site.memory.setdefault(module, site.p.get("router.projection.weight"))
    p = (site.x @ W.T).softmax(-1)
    largest, first = p.max(-1, keepdim=True)
    weights = torch.zeros_like(p).scatter(1, first, largest)
    site.memory["block"] = weights
    used, mean = site.token_mean((weights > 0).double()), site.token_mean(p)
    return site.mix(weights), {"load_balancing": p.shape[1] * (used * mean).sum()}


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("omni-router", r=2))
    case.check(formula)
    case.check(formula, train=False)


def test_two_matrices_for_the_model(fidelity):
    case = fidelity(MoloraConfig.from_method("omni-router"))
    found = [site for site in case.layers() if "router.projection.weight" in case.tensors(site)]
    assert found == ["layers.0.gate_proj", "layers.0.down_proj"]


def test_layers_with_other_numbers_of_experts_have_their_own(fidelity):
    case = fidelity(MoloraConfig.from_method("omni-router", num_experts=[3, 5]))
    found = {site: case.tensors(site).get("router.projection.weight") for site in case.layers()}
    sizes = {site: len(weight) for site, weight in found.items() if weight is not None}
    assert sizes == {"layers.0.gate_proj": 3, "layers.0.down_proj": 3,
                     "layers.1.gate_proj": 5, "layers.1.down_proj": 5}  # fmt: skip
