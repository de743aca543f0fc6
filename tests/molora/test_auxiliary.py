"""The auxiliary losses' gradient without a trainer: bare loops and accelerate."""

import re
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from peft import PeftModel
from torch import nn

import molora
from molora.auxiliary import LossScale
from molora.observe import routing_contexts
from molora.stats import RoutingStatistics

from .routed_twin import (
    LEADERS,
    Gradients,
    Losses,
    Twin,
    check_difference,
    checkpoint,
    gradients,
    padded,
    ragged_batch,
    routed_llama,
    tiny_llama,
    token_batch,
)

BALANCE = {"load_balancing": 3.0}
Z_LOSS = {"z_loss": 0.5}
BOTH = {**BALANCE, **Z_LOSS}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate keeps the accumulation of the last Accelerator for the whole process."""
    monkeypatch.setattr(GradientState, "_shared_state", {})


def backward(model: nn.Module, batches: list[dict]) -> Gradients:
    """Mean loss over micro-batches, in a loop that knows nothing of molora."""
    model.zero_grad()
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    return gradients(model)


@pytest.mark.parametrize("losses", [BALANCE, Z_LOSS, BOTH], ids=["balance", "z", "both"])
def test_bare_loop(losses: Losses):
    model, batch = routed_llama(losses), ragged_batch()
    expected = Twin(model).gradient([batch], losses)
    check_difference(backward(model, [batch]), backward(routed_llama(), [batch]), expected)


@pytest.mark.parametrize("scope", list(LEADERS))
def test_a_shared_decision_counts_once(scope: str):
    model, batch = routed_llama(BOTH, router_scope=scope), ragged_batch()
    twin = Twin(model, scope)
    expected = twin.gradient([batch], BOTH)
    without = backward(routed_llama(router_scope=scope), [batch])
    check_difference(backward(model, [batch]), without, expected)
    assert len(twin.decisions) == {"site": 14, "block": 8, "layer": 2}[scope]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("scope", ["site", "block"])
def test_checkpointing_adds_the_same_gradient(scope: str, reentrant: bool):
    model, batch = routed_llama(BOTH, router_scope=scope), ragged_batch()
    plain = backward(model, [batch])
    checkpoint(model, reentrant)
    for name, gradient in backward(model, [batch]).items():
        torch.testing.assert_close(gradient, plain[name], msg=lambda m, name=name: f"{name}: {m}")


def test_accelerate_loop_that_accumulates():
    batches = [ragged_batch(seed) for seed in range(4)]

    def loop(losses: Losses) -> tuple[PeftModel, Gradients]:
        GradientState._shared_state.clear()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        model = accelerator.prepare(routed_llama(losses))
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
        return model, gradients(model)

    model, with_losses = loop(BOTH)
    expected = Twin(model).gradient(batches, BOTH)
    check_difference(with_losses, loop({})[1], expected)


def test_bare_loop_that_accumulates_says_so():
    batches = [ragged_batch(seed) for seed in range(3)]
    model, without = routed_llama(BOTH), routed_llama()
    expected = Twin(model).gradient(batches, BOTH)
    molora.set_gradient_accumulation(model, 3)
    check_difference(backward(model, batches), backward(without, batches), expected)

    molora.set_gradient_accumulation(model, None)
    expected = Twin(model).gradient(batches[:1], BOTH)
    check_difference(backward(model, batches[:1]), backward(without, batches[:1]), expected)


def test_bare_loop_with_a_gradient_scaler_says_so():
    batches = [ragged_batch(seed) for seed in range(2)]

    def loop(losses: Losses) -> Gradients:
        model = routed_llama(losses)
        optimizer = torch.optim.SGD(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        molora.set_gradient_accumulation(model, 2, scaler)
        for batch in batches:
            scaler.scale(model(**batch).loss / 2).backward()
        scaler.unscale_(optimizer)
        return gradients(model)

    check_difference(loop(BOTH), loop({}), Twin(routed_llama()).gradient(batches, BOTH))


def test_what_a_loop_says_counts_more_than_what_a_trainer_says():
    scale, loss = LossScale(), torch.tensor(12.0)
    scale.start_window(4, None)
    assert scale(loss) == 3
    scale.choose(2, None)
    assert scale(loss) == 6
    scale.choose(None, None)
    assert scale(loss) == 3


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "x"], ids=repr)
def test_what_is_no_number_of_steps_is_refused(steps: Any):
    said = rf"steps={steps!r} must be a whole number of at least 1, or None"
    with pytest.raises(ValueError, match=re.escape(said)):
        molora.set_gradient_accumulation(routed_llama(), steps)


def test_accumulation_is_told_to_a_model_with_losses():
    with pytest.raises(ValueError, match="has no MoLoRA layer"):
        molora.set_gradient_accumulation(nn.Linear(2, 2), 2)


@pytest.mark.parametrize(("left", "right"), [(0, 1), (5, 0), (3, 20)])
def test_padding_counts_for_nothing(left: int, right: int):
    plain, batch = token_batch(), padded(token_batch(), left, right)
    model = routed_llama(BOTH)
    (context,) = routing_contexts(model)
    losses = []
    for inputs in (plain, batch):
        context.statistics = RoutingStatistics()
        with_losses = backward(model, [inputs])
        losses.append({k: v.losses for k, v in context.statistics.summarize().items()})
    assert losses[0] == {site: pytest.approx(values) for site, values in losses[1].items()}
    expected = Twin(model).gradient([plain], BOTH)
    check_difference(with_losses, backward(routed_llama(), [batch]), expected)


def test_a_batch_of_padding_alone_adds_nothing():
    batch = padded(token_batch(length=2), 0, 3)
    batch["attention_mask"].zero_()
    model, without = backward(routed_llama(BOTH), [batch]), backward(routed_llama(), [batch])
    for name, gradient in model.items():
        torch.testing.assert_close(gradient, without[name], rtol=0, atol=0)


def attached(model: nn.Module, batch: dict) -> int:
    """How many losses hang on the graph of a forward pass."""
    waiting, seen, found = [model(**batch).loss.grad_fn], set(), 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += node.name() == "_AttachBackward"
        waiting += [parent for parent, _ in node.next_functions]
    return found


def test_losses_hang_on_training_alone():
    batch = ragged_batch()
    assert attached(routed_llama(BOTH), batch) == 14
    assert attached(routed_llama(BOTH).eval(), batch) == 0
    assert attached(routed_llama(), batch) == 0
    with torch.no_grad():
        assert attached(routed_llama(BOTH), batch) == 0


def test_what_the_model_returns_does_not_change():
    batch = ragged_batch()
    with_losses, without = routed_llama(BOTH)(**batch), routed_llama()(**batch)
    assert torch.equal(with_losses.loss, without.loss)
    assert torch.equal(with_losses.logits, without.logits)


def test_a_pass_without_gradients_leaves_the_mask_of_the_recomputation():
    batch, other = ragged_batch(), token_batch(seed=5)
    model = routed_llama(BOTH)
    plain = backward(model, [batch])
    checkpoint(model, reentrant=False)
    model.zero_grad()
    loss = model(**batch).loss
    with torch.no_grad():
        model(**other)  # as a reference model's pass, between forward and backward
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_each_of_several_passes_is_recomputed_with_its_own_mask(reentrant: bool):
    batches = [ragged_batch(), token_batch(seed=5), ragged_batch(seed=6)]
    batches[2]["attention_mask"] = batches[2]["attention_mask"].flip(1)
    model = routed_llama(BOTH)
    molora.set_gradient_accumulation(model, len(batches))
    plain = backward(model, batches)
    checkpoint(model, reentrant)
    model.zero_grad()
    torch.stack([model(**batch).loss for batch in batches]).mean().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name])


def test_the_plain_model_keeps_no_losses_after_unload():
    base, batch = routed_llama(BOTH).unload(), ragged_batch()
    assert routing_contexts(base) == [] and not base._forward_pre_hooks
    assert torch.equal(base(**batch).loss, tiny_llama()(**batch).loss)
