"""Rényi's entropy from its formula, its limits, and how it is ordered."""

import math

import pytest
import torch

from molora.losses import LOSSES
from molora.routing import Routing

from .records import MASKS, check_padding, loss, real_tokens, record


def formula(probs: list[float], q: float) -> float:
    if q == 1:
        return -sum(p * math.log(p) for p in probs) / math.log(len(probs))
    return math.log(sum(p**q for p in probs)) / (1 - q) / math.log(len(probs))


@pytest.mark.parametrize("q", [0.5, 1, 1.1, 2, 5])
@pytest.mark.parametrize("mask", ["all", "some"])
def test_formula(q: float, mask: str):
    routing = record(mask=MASKS[mask])
    terms = [formula(routing.probs[t].tolist(), q) for t in real_tokens(routing)]
    expected = sum(terms) / len(terms)
    assert loss("renyi_entropy", routing, {"q": q}).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("q", [0.5, 1, 2])
def test_uniform_one_hot_and_half(q: float):
    rows = torch.tensor([[1 / 4] * 4, [0, 0, 1, 0], [1 / 2, 0, 1 / 2, 0]], dtype=torch.float64)
    for row, expected in zip(rows, (1.0, 0.0, 0.5), strict=True):
        probs = row.expand(4, 4)
        value = loss("renyi_entropy", Routing(probs, probs, probs), {"q": q})
        assert value.item() == pytest.approx(expected, abs=1e-12)


def test_it_falls_with_the_order_and_is_shannons_near_one():
    values = [loss("renyi_entropy", record(), {"q": q}).item() for q in (0.5, 1, 2, 5)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    near = loss("renyi_entropy", record(), {"q": 1 + 1e-6}).item()
    assert near == pytest.approx(values[1], rel=1e-5)


def test_padding():
    check_padding("renyi_entropy", {})


@pytest.mark.parametrize("bad", [0, -1.0, math.inf, math.nan])
def test_an_order_out_of_range(bad: float):
    with pytest.raises(ValueError, match=f"q={bad}"):
        LOSSES.build("renyi_entropy", {"q": bad})
