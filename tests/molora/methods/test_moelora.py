"""MoELoRA from the formula in its file, the contrastive loss pair by pair."""

import pytest
import torch

from molora import MoloraConfig
from molora.losses.base import sample_tokens
from molora.routing import Routing

TEMPERATURE = 0.4


def contrast(site, used):
    outputs = site.outputs()
    pairs = [(t, e) for t, e in used.nonzero().tolist() if site.mask[t]]
    h = {(t, e): outputs[e][t] / outputs[e][t].norm() for t, e in pairs}
    terms = []
    for i in pairs:
        powers = {j: (h[i] @ h[j] / TEMPERATURE).exp() for j in pairs if j != i}
        own = [power for j, power in powers.items() if j[1] == i[1]]
        if own:
            terms.append(-(sum(own) / sum(powers.values())).log())
    return torch.stack(terms).mean()


def formula(site):
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    used = torch.zeros_like(probs).scatter(1, probs.topk(2).indices, 1.0)
    weights = used * probs / (used * probs).sum(-1, keepdim=True)
    balance = probs.shape[1] / 2 * (site.token_mean(used) * site.token_mean(probs)).sum()
    return site.mix(weights), {"load_balancing": balance, "contrastive": contrast(site, used)}


def test_formula(fidelity):
    losses = {
        "load_balancing": 0.3,
        "contrastive": {"coefficient": 0.5, "temperature": TEMPERATURE},
    }
    targets = {"target_modules": ["o_proj", "down_proj"], "losses": losses}
    config = MoloraConfig.from_method("moelora", num_experts=[3, 4], r=[2, 3], **targets)
    fidelity(config).check(formula)


def test_without_directions_there_is_neither_loss_nor_gradient(fidelity):
    case = fidelity(MoloraConfig.from_method("moelora", target_modules=["o_proj"]))
    for site in case.layers():
        case.tensors(site)["experts.B"].data.zero_()
    outcome = case.run()
    assert all(terms["contrastive"] == 0 for terms in outcome.losses.values())
    assert all(grad.isfinite().all() for grad in outcome.gradients.values())


@pytest.mark.parametrize("pads", [0, 5, 9])
def test_a_sample_takes_real_tokens_first(pads: int):
    weights = torch.ones(12, 2)
    routing = Routing(weights, weights, weights / 2, mask=torch.arange(12) >= pads)
    sample = sample_tokens(routing, 4)
    assert len(set(sample.tolist())) == 4
    assert (sample >= pads).sum() == min(4, 12 - pads)
