"""LoRA-Mixer's loss from its formula, and which way it pushes."""

import math

import pytest
import torch

from molora.routing import Routing

from .records import MASKS, check_padding, loss, real_tokens, record

NAME = "specialization_balance"


@pytest.mark.parametrize("weight", [0.1, -0.5, 0.0])
@pytest.mark.parametrize("mask", ["all", "some"])
def test_formula(weight: float, mask: str):
    routing = record(mask=MASKS[mask])
    rows = [routing.probs[t].tolist() for t in real_tokens(routing)]
    first = [row.index(max(row)) for row in rows]
    balance = sum(
        first.count(e) / len(rows) * sum(row[e] for row in rows) / len(rows) for e in range(4)
    )
    entropy = sum(-p * math.log(p) for row in rows for p in row) / len(rows) / math.log(4)
    value = loss(NAME, routing, {"entropy_weight": weight}).item()
    assert value == pytest.approx(4 * balance + weight * entropy, rel=1e-12)


def of(probs: torch.Tensor) -> float:
    return loss(NAME, Routing(probs, probs, probs), {"entropy_weight": 0.3}).item()


def test_balanced_uniform_and_collapsed():
    assert of(torch.eye(4).repeat(2, 1)) == pytest.approx(1.0)
    assert of(torch.full((8, 4), 0.25)) == pytest.approx(1.3)
    assert of(torch.eye(4)[[2] * 8]) == pytest.approx(4.0)


@pytest.mark.parametrize(("weight", "peaks"), [(1.0, True), (-1.0, False)])
def test_a_positive_weight_peaks_the_gate(weight: float, peaks: bool):
    # Two tokens that mirror each other: f P is constant along the step, the entropy alone moves.
    logits = torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(-1)
    loss(NAME, Routing(probs, logits, probs), {"entropy_weight": weight}).backward()
    after = (logits - 0.1 * logits.grad).softmax(-1)
    assert (after.amax(-1) > probs.amax(-1)).tolist() == [peaks] * 2


def test_padding():
    check_padding(NAME, {})
