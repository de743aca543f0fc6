"""MoLE's balance from its formula, as published and as a divergence."""

import math

import pytest
import torch

from molora.routing import Routing

from .records import MASKS, check_padding, loss, real_tokens, record


@pytest.mark.parametrize("mask", ["all", "some"])
def test_it_is_the_published_loss_without_its_floor_over_the_experts(mask: str):
    routing = record(mask=MASKS[mask])
    rows = [routing.probs[t].tolist() for t in real_tokens(routing)]
    published = -math.log(math.prod(sum(row[e] for row in rows) / len(rows) for e in range(4)))
    value = loss("gate_balance", routing, {}).item()
    assert 4 * value + 4 * math.log(4) == pytest.approx(published, rel=1e-12)


def test_balance_is_zero_and_a_lost_expert_costs_without_bound():
    balanced = torch.eye(4, dtype=torch.float64)
    assert loss("gate_balance", Routing(balanced, balanced, balanced), {}).item() == 0
    values = []
    for rest in (1e-2, 1e-4, 1e-8):
        probs = torch.tensor([[rest, (1 - rest) / 2, (1 - rest) / 2]], dtype=torch.float64)
        probs = probs.expand(4, 3)
        values.append(loss("gate_balance", Routing(probs, probs, probs), {}).item())
        expected = sum(math.log(1 / 3 / p) / 3 for p in probs[0].tolist())
        assert values[-1] == pytest.approx(expected, rel=1e-12)
    assert values[0] < values[1] < values[2]


def test_an_expert_whose_probability_underflows_leaves_it_finite():
    logits = torch.tensor([[0.0, 0.0, -500.0]] * 4, requires_grad=True)
    probs = logits.softmax(-1)
    value = loss("gate_balance", Routing(probs, logits, probs), {})
    value.backward()
    assert 20 < value.item() < 100 and torch.isfinite(logits.grad).all()


def test_padding():
    check_padding("gate_balance", {})
