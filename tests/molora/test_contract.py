"""What holds for every configuration, whatever its gate, scope and allocation."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import molora
from molora.layer import MoloraLayer

from .cases import Case, every_case, every_routed_case

PROMPTS = [[5, 9, 33, 12, 60, 7, 21], [44, 3, 17], [8, 8, 50, 31, 29]]


def collate(rows: list[list[int]], side: str, length: int) -> dict[str, Tensor]:
    """Rows padded with 0 on one side, with the positions that a trainer or `generate` passes."""
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        real = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, real], mask[i, real] = torch.tensor(row), 1
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}


@torch.no_grad()
def run(model: Any, batch: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Per row of the batch: logits of its real tokens, and the experts they use at each site."""
    with molora.observe(model) as records:
        logits = model(**batch).logits
    real = batch["attention_mask"].bool()
    used = {site: r.selected.unflatten(0, real.shape) for site, r in records.items()}
    rows = range(len(real))
    return [logits[i][real[i]] for i in rows], {
        site: [selected[i][real[i]] for i in rows] for site, selected in used.items()
    }


def state_of(model: Any) -> dict[str, Tensor]:
    """Every tensor that the model owns, buffers that aren't saved included."""
    tensors = {
        **dict(model.named_parameters()),
        **dict(model.named_buffers()),
        **model.state_dict(),
    }
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_state(model: Any, before: dict[str, Tensor]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the trainable parameters after one training step's forward and backward."""
    model.zero_grad()
    torch.manual_seed(3)
    model(**batch).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@every_case
def test_a_new_adapter_changes_nothing(case: Case, tiny_model, tiny_batch, logits_of):
    base, batch = tiny_model("llama"), tiny_batch("llama")
    expected = logits_of(base, batch)
    model = get_peft_model(base, case.config())
    assert torch.equal(logits_of(model, batch), expected)
    assert torch.equal(logits_of(model.train(), batch), expected)


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_change_no_token(case: Case, build, side: str):
    model = build(case)
    batched, batched_experts = run(model, collate(PROMPTS, side, 9))
    for i, prompt in enumerate(PROMPTS):
        alone, alone_experts = run(model, collate([prompt], side, len(prompt)))
        torch.testing.assert_close(batched[i], alone[0], atol=1e-5, rtol=1e-5)
        assert alone_experts.keys() == batched_experts.keys()
        for site, experts in alone_experts.items():
            assert torch.equal(batched_experts[site][i], experts[0]), site


@every_case
def test_decoding_with_a_cache_equals_one_pass(case: Case, build):
    model, ids = build(case), torch.tensor(PROMPTS[:1])
    with torch.no_grad(), molora.observe(model) as whole:
        expected = model(input_ids=ids).logits
    with torch.no_grad(), molora.observe(model) as stepwise:
        output = model(input_ids=ids[:, :3], attention_mask=torch.ones(1, 3), use_cache=True)
        logits = [output.logits]
        for t in range(3, ids.shape[1]):
            mask = torch.ones(1, t + 1)
            cache = output.past_key_values
            output = model(ids[:, t : t + 1], mask, past_key_values=cache, use_cache=True)
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5, rtol=1e-5)
    for site, routing in whole.items():
        assert torch.equal(stepwise[site].selected, routing.selected), site


@every_case
def test_a_forward_pass_changes_no_state(case: Case, build, tiny_batch):
    model, batch = build(case, losses=case.losses), tiny_batch("llama")
    before = state_of(model)
    for mode in (model.eval, model.train):
        mode()
        model(**batch).loss.backward()
        with torch.no_grad():
            model(**batch)
        assert_same_state(model, before)


@every_case
def test_every_expert_and_router_gets_a_gradient(case: Case, build, tiny_batch):
    model = build(case).train()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".molora_" in name for name in trainable) and trainable
    grads = gradients(model, tiny_batch("llama"))
    assert [name for name in trainable if grads[name] is None] == []
    dead = [name for name, grad in grads.items() if not grad.abs().sum() > 0]
    assert dead == []
    routers = [name for name in trainable if "molora_router" in name]
    assert bool(routers) == case.is_routed


@every_case
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(case: Case, build, tiny_batch, reentrant: bool):
    noise = {"router_options": {**case.fields.get("router_options", {}), "noise": 0.5}}
    model = build(case, losses=case.losses, **noise).train()
    batch = tiny_batch("llama")
    expected = gradients(model, batch)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    passes: list[Any] = []
    last_layer = model.get_base_model().model.layers[-1]
    last_layer.input_layernorm.register_forward_hook(lambda *_: passes.append(1))
    actual = gradients(model, batch)
    assert len(passes) == 2  # forward and its repetition in backward
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-6, rtol=1e-5)


@every_routed_case
def test_noise_is_drawn_in_training_only(case: Case, build, tiny_batch, logits_of):
    noise = {"router_options": {**case.fields.get("router_options", {}), "noise": 0.5}}
    model, batch = build(case, **noise), tiny_batch("llama")
    assert torch.equal(logits_of(model, batch), logits_of(model, batch))
    model.train()
    assert not torch.equal(logits_of(model, batch), logits_of(model, batch))


@every_routed_case
def test_sites_that_share_a_router_decide_once(case: Case, build, tiny_batch):
    model = build(case)
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, molora.Router):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad(), molora.observe(model) as records:
        model(**tiny_batch("llama"))
    decisions: dict[tuple[str, str], list[Tensor]] = {}
    for site, routing in records.items():
        _, _, layer, _, module = site.split(".")
        decisions.setdefault((layer, case.decides(module)), []).append(routing.weights)
    assert len(calls) == len(set(calls)) == len(decisions)
    for first, *others in decisions.values():
        assert all(torch.equal(weights, first) for weights in others)


def saved_whole(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_case
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_whole])
def test_a_copy_is_equal_and_independent(
    case: Case, build, tiny_batch, logits_of, duplicate: Callable[[Any], Any]
):
    model, batch = build(case, losses=case.losses), tiny_batch("llama")
    expected = logits_of(model, batch)
    twin = duplicate(model)
    assert torch.equal(logits_of(twin, batch), expected)
    with molora.observe(twin) as records:
        logits_of(model, batch)
        assert len(records) == 0
        logits_of(twin, batch)
        assert bool(records) == case.is_routed
    ours = gradients(model.train(), batch)
    theirs = gradients(twin.train(), batch)
    assert all(torch.equal(theirs[name], grad) for name, grad in ours.items())
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits_of(model.eval(), batch), expected)


@every_case
def test_training_follows_inference_mode(case: Case, build, tiny_batch):
    model, batch = build(case, losses=case.losses), tiny_batch("llama")
    with torch.inference_mode():
        model(**batch)
    assert all(grad is not None for grad in gradients(model.train(), batch).values())


@every_routed_case
def test_nothing_of_a_pass_outlives_it(case: Case, build, tiny_batch):
    model = build(case, losses=case.losses).train()
    model(**tiny_batch("llama")).loss.backward()
    left = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, MoloraLayer)
        for decision in layer.molora_decision.values()
        if decision._routing is not None or decision._source is not None
    ]
    assert left == []
