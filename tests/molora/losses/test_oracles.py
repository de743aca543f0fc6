"""What each loss is worth at perfect balance and at collapse, and that padding never counts."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from molora.losses import LOSSES
from molora.passes import Pass
from molora.routing import Routing, SiteInput

E, SAMPLES, LENGTH = 4, 2, 6


def routing(weights: Tensor, probs: Tensor | None = None, mask: Tensor | None = None) -> Routing:
    probs = weights if probs is None else probs
    extras = {"threshold": torch.zeros(len(weights), 1), "null_selected": torch.zeros(len(weights))}
    return Routing(weights, probs.clamp(min=1e-30).log(), probs, mask, extras=extras)


def value(name: str, record: Routing, **options: Any) -> float:
    inputs = SiteInput(
        hidden=torch.zeros(len(record.weights), 3),
        mask=record.mask,
        shape=(SAMPLES, len(record.weights) // SAMPLES),
        given=Pass(labels={"task_ids": torch.arange(SAMPLES) % 2}),
        experts=SimpleNamespace(ranks=(1, 2, 3, 6)),
    )
    return LOSSES.build(name, options)(record, inputs).item()


def balanced() -> Routing:
    """Every pair of experts equally often, with uniform probabilities."""
    pairs = torch.tensor(list(itertools.combinations(range(E), 2)) * SAMPLES)
    weights = torch.zeros(SAMPLES * LENGTH, E).scatter(1, pairs, 0.5)
    return routing(weights, torch.full_like(weights, 1 / E))


def collapsed(expert: int = 0) -> Routing:
    return routing(torch.eye(E)[[expert] * (SAMPLES * LENGTH)])


BALANCED = {
    "load_balancing": 1.0,
    "importance_cv": 0.0,
    "null_balancing": 1.0,
    "parameter_penalty": 1.0,
    "tsallis_entropy": 1.0,
}
COLLAPSED = {
    "load_balancing": E,
    "importance_cv": E - 1,
    "null_balancing": E,
    "parameter_penalty": E * 1 / 3,  # the first expert has a third of the mean rank
    "tsallis_entropy": 0.0,
}


@pytest.mark.parametrize("name", BALANCED)
def test_perfect_balance(name: str):
    assert value(name, balanced()) == pytest.approx(BALANCED[name], abs=1e-6)


@pytest.mark.parametrize("name", COLLAPSED)
def test_collapse(name: str):
    assert value(name, collapsed()) == pytest.approx(COLLAPSED[name], abs=1e-5)


@pytest.mark.parametrize("name", [*BALANCED, "localized_balancing"])
def test_padding_never_counts(name: str):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(SAMPLES, LENGTH, E, generator=generator).softmax(-1)
    padding = torch.eye(E).expand(SAMPLES, E, E)
    padded = torch.cat([weights, padding], 1)
    mask = (torch.arange(LENGTH + E) < LENGTH).expand(SAMPLES, -1)
    expected = value(name, routing(weights.flatten(0, 1)))
    actual = value(name, routing(padded.flatten(0, 1), mask=mask.flatten()))
    assert actual == pytest.approx(expected, rel=1e-5)
    nothing = routing(padded.flatten(0, 1), mask=torch.zeros(SAMPLES * (LENGTH + E)).bool())
    assert math.isfinite(value(name, nothing))


@pytest.mark.parametrize("q", [0.5, 1, 1.1, 2])
def test_entropy(q: float):
    assert value("tsallis_entropy", balanced(), q=q) == pytest.approx(1, abs=1e-5)
    assert value("tsallis_entropy", collapsed(), q=q) == pytest.approx(0, abs=1e-5)
    # p = (1/2, 1/2, 0, 0)
    row = routing(torch.tensor([[0.5, 0.5, 0, 0]] * SAMPLES))
    most = math.log(E) if q == 1 else (1 - E ** (1 - q)) / (q - 1)
    half = math.log(2) if q == 1 else (1 - 2 * 0.5**q) / (q - 1)
    assert value("tsallis_entropy", row, q=q) == pytest.approx(half / most, abs=1e-5)


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("groups", [2, 4])
def test_localized_balancing_is_zero_at_its_ratio(delta: float, groups: int):
    block = torch.arange(E) * groups // E
    rows = []
    for task in range(SAMPLES):  # the named block gets (1 - delta) / (1 + delta) of the others
        row = torch.where(block == task, 1 - delta, 1 + delta)
        rows.append(row / row.sum())
    record = routing(torch.stack(rows).repeat_interleave(LENGTH, 0))
    options = {"delta": delta, "num_groups": groups}
    assert value("localized_balancing", record, **options) == pytest.approx(0, abs=1e-6)
    uniform = value("localized_balancing", balanced(), **options)
    assert (uniform > 1e-3) == (delta > 0)


def test_localized_balancing_leaves_out_a_sample_of_padding():
    weights = torch.randn(SAMPLES * LENGTH, E, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(SAMPLES * LENGTH) < LENGTH
    loss = value("localized_balancing", routing(weights.softmax(-1), mask=mask))
    load = weights.softmax(-1)[:LENGTH].mean(0) * torch.tensor([1.1, 1.1, 0.9, 0.9])
    assert loss == pytest.approx((load.var() / load.mean() ** 2).item(), rel=1e-5)


def test_the_first_choice_alone():
    weights = torch.tensor([[0.6, 0.4, 0, 0], [0.7, 0, 0.3, 0]])
    share = weights.mean(0)
    expected = E * share[0].item()  # everyone's first choice is expert 0
    assert value("load_balancing", routing(weights), first_choice=True) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "option", "bad"),
    [
        ("contrastive", "temperature", 0.0),
        ("contrastive", "min_norm", -1.0),
        ("contrastive", "max_tokens", 1),
        ("localized_balancing", "delta", 1.0),
        ("localized_balancing", "num_groups", 0),
        ("tsallis_entropy", "q", 0.0),
    ],
)
def test_options_out_of_range(name: str, option: str, bad: float):
    with pytest.raises(ValueError, match=f"{option}={bad}"):
        LOSSES.build(name, {option: bad})
