"""DSelect-k from its formula, with a number of experts that is no power of two."""

import math

import pytest
import torch

from molora import MoloraConfig, SiteInput
from molora.gates import GATES


def smooth_step(t):
    if t <= -0.5:
        return t * 0
    return t * 0 + 1 if t >= 0.5 else -2 * t**3 + 1.5 * t + 0.5


def formula(site):
    experts = len(site.ranks)
    bits = math.ceil(math.log2(experts))
    z = site.x @ site.p["router.weight"].T
    mixing = z[:, 2 * bits :].softmax(-1)
    weights, entropies = [], []
    for t in range(len(z)):
        w, h = 0, 0
        for i in range(2):
            b = [smooth_step(z[t, i * bits + j]) for j in range(bits)]
            r = []
            for e in range(experts):
                code = [(e >> j) & 1 for j in range(bits)]
                r.append(math.prod(b[j] if code[j] else 1 - b[j] for j in range(bits)))
            r = torch.stack(r)
            w = w + mixing[t, i] * r
            h = h - (r * r.clamp_min(1e-30).log()).sum() + 1 / r.sum() - 1
        weights.append(w)
        entropies.append(h)
    loss = site.token_mean(torch.stack(entropies))
    return site.mix(torch.stack(weights)), {"selector_entropy": loss}


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("dselect-k", num_experts=[4, 6], r=[2, 3]), spread=0.1)
    case.check(formula)
    case.check(formula, train=False)


@pytest.mark.parametrize("expert", range(8))
def test_saturated_bits_point_at_one_expert(expert):
    gate = GATES.build("binary_selectors", {}, num_experts=8, top_k=1, in_features=2)
    bits = [9.0 if (expert >> j) & 1 else -9.0 for j in range(3)]
    routing = gate(torch.tensor([[*bits, 0.3]]), SiteInput(torch.zeros(1, 2)))
    assert routing.weights.tolist() == [[float(e == expert) for e in range(8)]]
