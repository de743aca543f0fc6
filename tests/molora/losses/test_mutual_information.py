"""Mutual information of expert and token, or expert and task, from the joint distribution."""

import math

import pytest
import torch
from peft import get_peft_model

from molora import MoloraConfig
from molora.losses import LOSSES
from molora.routing import Routing

from .records import MASKS, check_padding, loss, real_tokens, record

NAME = "mutual_information"


def information(joint: list[list[float]]) -> float:
    """Sum over the cells of M log(M / (row total * column total))."""
    rows = [sum(row) for row in joint]
    columns = [sum(column) for column in zip(*joint, strict=True)]
    return sum(
        m * math.log(m / (rows[i] * columns[e]))
        for i, row in enumerate(joint)
        for e, m in enumerate(row)
        if m > 0
    )


@pytest.mark.parametrize("mask", ["all", "some"])
def test_tokens(mask: str):
    routing = record(mask=MASKS[mask])
    tokens = real_tokens(routing)
    joint = [[p / len(tokens) for p in routing.probs[t].tolist()] for t in tokens]
    expected = -information(joint) / math.log(4)
    assert loss(NAME, routing, {}).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mask", ["all", "some"])
@pytest.mark.parametrize("ids", [[7, 2, 7, 5], [0, 1, 2, 3], [3, 3, 3, 3]], ids=str)
def test_tasks(mask: str, ids: list[int]):
    routing = record(mask=MASKS[mask])  # four samples of two tokens; the third is all padding
    joint = []
    for task in sorted(set(ids)):
        samples = []
        for n in (n for n in range(4) if ids[n] == task):
            mine = [routing.probs[t].tolist() for t in real_tokens(routing) if t // 2 == n]
            if mine:
                samples.append([sum(p) / len(mine) for p in zip(*mine, strict=True)])
        if samples:
            joint.append([sum(p) / len(samples) for p in zip(*samples, strict=True)])
    joint = [[m / len(joint) for m in row] for row in joint]
    labels = {"task_ids": torch.tensor(ids)}
    value = loss(NAME, routing, {"about": "task"}, shape=(4, 2), labels=labels)
    assert value.item() == pytest.approx(-information(joint) / math.log(4), rel=1e-9, abs=1e-12)
    (grad,) = torch.autograd.grad(value, routing.logits)
    assert (grad.abs().sum() > 1e-6) == (len(joint) > 1)


@pytest.mark.parametrize("about", ["token", "task"])
def test_ideal_uniform_and_collapsed(about: str):
    own = torch.eye(4, dtype=torch.float64)
    labels = {"task_ids": torch.arange(4)}
    for probs, expected in ((own, -1), (torch.full_like(own, 0.25), 0), (own[[1] * 4], 0)):
        routing = Routing(probs, probs, probs)
        value = loss(NAME, routing, {"about": about}, shape=(4, 1), labels=labels)
        assert value.item() == pytest.approx(expected, abs=1e-12)


def test_two_tasks_say_no_more_than_the_log_of_two():
    probs = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 1]]
    labels = {"task_ids": torch.tensor([0, 1])}
    value = loss(NAME, Routing(probs, probs, probs), {"about": "task"}, labels=labels)
    assert value.item() == pytest.approx(-math.log(2) / math.log(4))


@pytest.mark.parametrize("about", ["token", "task"])
def test_padding(about: str):
    check_padding(NAME, {"about": about}, labels={"task_ids": torch.tensor([0, 1])})


def test_what_it_needs_is_named(tiny_model, tiny_batch):
    with pytest.raises(ValueError, match="unknown loss option about 'tokens'; known: task, token"):
        LOSSES.build(NAME, {"about": "tokens"})
    losses = {NAME: {"coefficient": 0.1, "about": "task"}}
    config = MoloraConfig(num_experts=3, losses=losses, target_modules=["up_proj"])
    model = get_peft_model(tiny_model("llama"), config).train()
    with pytest.raises(ValueError, match="the loss 'mutual_information' needs the task of each"):
        model(**tiny_batch("llama"))
    with pytest.raises(ValueError, match=r"task_ids has the shape \(3,\), but the batch holds 2"):
        loss(NAME, record(), {"about": "task"}, labels={"task_ids": torch.arange(3)})
