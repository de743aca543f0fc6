"""HMoE from its formula: unequal ranks and the parameter penalty."""

import torch

from molora import MoloraConfig

RANKS = [[1, 2, 3], [4, 1, 2, 5]]


def formula(site):
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    used = torch.zeros_like(probs).scatter(1, probs.topk(2).indices, 1.0)
    weights = used * probs / (used * probs).sum(-1, keepdim=True)
    sizes = torch.tensor(RANKS[site.layer]).double()
    # the printed loss, of sizes relative to their mean, over K
    mean_size = site.token_mean(used * sizes / sizes.mean())
    loss = probs.shape[1] * (mean_size * site.token_mean(probs)).sum() / 2
    return site.mix(weights), {"parameter_penalty": loss}


def test_formula(fidelity):
    fidelity(MoloraConfig.from_method("hmoe", num_experts=[3, 4], r=RANKS)).check(formula)
