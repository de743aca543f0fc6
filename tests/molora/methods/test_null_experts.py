"""Null experts from their formula, the loss included."""

import torch

from molora import MoloraConfig
from molora.gates import GATES
from molora.routing import SiteInput

NULL, K = 3, 2


def formula(site):
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    experts = len(site.ranks)
    weights, counts = torch.zeros_like(probs), torch.zeros(probs.shape[1]).double()
    for t, row in enumerate(probs):
        chosen = row.topk(K).indices
        real = chosen[chosen < experts]
        weights[t, real] = row[real] / row[real].sum()
        counts[chosen] += site.mask[t]
    counts[experts:] = counts[experts:].mean()
    shares = counts / counts.sum()
    loss = (experts + NULL) * (shares * site.token_mean(probs)).sum()
    return site.mix(weights[:, :experts]), {"null_balancing": loss}


def config(**overrides) -> MoloraConfig:
    options = {"num_experts": [3, 4], "r": [2, 3], "top_k": K, "gate_options": {"num_null": NULL}}
    return MoloraConfig.from_method("null-experts", **{**options, **overrides})


def test_formula(fidelity):
    case = fidelity(config())
    case.check(formula)
    case.check(formula, train=False)


def test_without_null_experts_it_is_top_k():
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    inputs = SiteInput(hidden=torch.zeros(9, 1))
    fields = {"num_experts": 4, "top_k": 2, "in_features": 1}
    ours = GATES.build("null_experts", {"num_null": 0}, **fields)(logits, inputs)
    theirs = GATES.build("top_k", {}, **fields)(logits, inputs)
    assert torch.equal(ours.selected, theirs.selected)
    torch.testing.assert_close(ours.weights, theirs.weights, atol=1e-7, rtol=1e-6)


def test_a_token_may_choose_null_experts_only():
    gate = GATES.build("null_experts", {"num_null": 2}, num_experts=3, top_k=2, in_features=1)
    logits = torch.tensor([[0.0, 1, 2, 9, 9], [9.0, 1, 2, 9, 3]], requires_grad=True)
    routing = gate(logits, SiteInput(hidden=torch.zeros(2, 1)))
    assert routing.weights.tolist() == [[0, 0, 0], [1, 0, 0]]
    assert routing.extras["null_selected"].tolist() == [2, 1]
    (grad,) = torch.autograd.grad(routing.weights.square().sum(), logits)
    assert grad.isfinite().all()
