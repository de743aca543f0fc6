"""What holds for every published method, whoever wrote it; a new one is covered by its name alone.

Where a method differs on purpose, a table of `contract_exceptions.py` says so and why.
"""

from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

import molora
from molora import MoloraConfig, RoutingLabelCollator, available_methods
from molora.gates import GATES
from molora.layer import MoloraLayer

from ..test_contract import PROMPTS, assert_same_state, collate, gradients, run, state_of
from ..trainer_runs import QUIET, tokenizer
from .contract_exceptions import (
    AT_REST,
    BATCH,
    COUNT_RULES,
    COUNTS,
    FIT,
    NOT_CAUSAL,
    NOT_LORA,
    ORDERED,
    RATES,
    STARTS_NEAR,
    SUM_RULES,
    SUMS,
    UNTAUGHT,
)
from .labels import PROMPT, labels_for, needs_of

every_method = pytest.mark.parametrize("name", available_methods())
EIGHT = [*PROMPTS, [13], [5, 6, 7, 8, 9, 10, 11, 12], [40, 2], [3, 3, 3, 3], [62, 61, 60]]


def config_of(name: str, **overrides: Any) -> MoloraConfig:
    fields = {"lora_dropout": 0.0, "task_type": "CAUSAL_LM", **FIT.get(name, {}), **overrides}
    return MoloraConfig.from_method(name, **fields)


@pytest.fixture
def build(tiny_model):
    """`build(name, **overrides)`: a tiny Llama with that method, none of its parameters at rest.

    Passes that aren't given a task are of task 1.
    """
    with ExitStack() as labels:

        def make(name: str, **overrides: Any) -> Any:
            config = config_of(name, init_lora_weights=False, **overrides)
            model = get_peft_model(tiny_model("llama"), config).eval()
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
            labels.enter_context(molora.routing_labels(model, task_ids=torch.tensor([1])))
            return model

        yield make


@pytest.fixture
def batch_for(tiny_batch):
    """`batch_for(name)`: a padded batch with labels and all that the method's losses may ask."""

    def make(name: str) -> dict[str, Tensor]:
        batch = tiny_batch("llama")
        labels = labels_for(config_of(name), batch["input_ids"], batch["attention_mask"])
        tasks = {"routing_task_ids": torch.tensor([0, 1])}
        return {**batch, **labels, **tasks, **BATCH.get(name, {})}

    return make


def routed_layers(model: Any) -> dict[str, MoloraLayer]:
    """Those with experts to choose from, by the name of the site."""
    return {
        layer.molora_allocation["default"].site.name: layer
        for layer in model.modules()
        if isinstance(layer, MoloraLayer) and layer.is_routed("default")
    }


def parts_of(layer: MoloraLayer, kind: str) -> dict[str, Tensor]:
    """Parameters and buffers of a layer's router or gate."""
    parts = getattr(layer, f"molora_{kind}")
    return dict(parts["default"].state_dict(keep_vars=True)) if "default" in parts else {}


def test_every_exception_is_a_method():
    tables = (
        FIT,
        STARTS_NEAR,
        SUMS,
        COUNTS,
        ORDERED,
        UNTAUGHT,
        AT_REST,
        NOT_LORA,
        NOT_CAUSAL,
        BATCH,
        RATES,
    )
    assert {name for table in tables for name in table} <= set(available_methods())


@every_method
def test_a_new_adapter_changes_nothing(name: str, tiny_model, tiny_batch, batch_for, logits_of):
    base = tiny_model("llama")
    expected = logits_of(base, tiny_batch("llama"))
    actual = logits_of(get_peft_model(base, config_of(name)).eval(), batch_for(name))
    torch.testing.assert_close(actual, expected, atol=STARTS_NEAR.get(name, 0.0), rtol=0)


@every_method
def test_weights_and_selected_experts(name: str, build, batch_for, logits_of):
    model = build(name)
    with molora.observe(model) as records:
        logits_of(model, batch_for(name))
    layers = routed_layers(model)
    assert records.keys() == layers.keys()
    for site, routing in records.items():
        allocation = layers[site].molora_allocation["default"]
        total, used = routing.weights.sum(-1), routing.selected.sum(-1)
        torch.testing.assert_close(routing.probs.sum(-1), torch.ones_like(total), atol=1e-4, rtol=0)
        assert routing.weights.shape[-1] == len(allocation.ranks)
        assert SUM_RULES[SUMS.get(name, "1")](total, used).all(), site
        assert COUNT_RULES[COUNTS.get(name, "top_k")](used, allocation.top_k).all(), site


@every_method
def test_the_order_of_the_experts_means_nothing(name: str, build, batch_for, logits_of):
    if name in ORDERED:
        pytest.skip(ORDERED[name])
    model, batch = build(name), batch_for(name)
    expected = logits_of(model, batch)
    for layer in routed_layers(model).values():
        _reverse_experts(layer)
    torch.testing.assert_close(logits_of(model, batch), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def _reverse_experts(layer: MoloraLayer) -> None:
    """The experts of equal rank in reverse order, and all that belongs to each of them."""
    ranks = layer.molora_allocation["default"].ranks
    order = list(range(len(ranks)))
    for rank in set(ranks):
        same = [e for e in order if ranks[e] == rank]
        for e, f in zip(same, reversed(same), strict=True):
            order[e] = f
    layer.molora_experts["default"].reorder(order)
    for kind in ("router", "gate"):
        for tensor in parts_of(layer, kind).values():
            if len(tensor) >= len(ranks) and _has_a_row_for_each_expert(layer, tensor):
                tensor[: len(ranks)] = tensor[order]


def _has_a_row_for_each_expert(layer: MoloraLayer, tensor: Tensor) -> bool:
    return len(tensor) == layer.molora_gate["default"].num_logits


@every_method
def test_the_task_teaches_the_router(name: str, build, batch_for):
    if name in UNTAUGHT:
        pytest.skip(UNTAUGHT[name])
    model = build(name)  # in evaluation mode no loss but the task's is there
    model(**batch_for(name)).loss.backward()
    routers = {
        f"{site} {kind} {key}": tensor.grad
        for site, layer in routed_layers(model).items()
        for kind in ("router", "gate")
        for key, tensor in parts_of(layer, kind).items()
        if tensor.requires_grad
    }
    taught = GATES.get(config_of(name).gate).task_trains_router
    for key, grad in routers.items():
        assert (grad is not None and bool(grad.abs().sum() > 0)) == taught, key


@every_method
@pytest.mark.filterwarnings("ignore:molora. no site has experts to choose from")
def test_one_expert_is_plain_lora(name: str, build, tiny_model, tiny_batch, logits_of):
    if name in NOT_LORA:
        pytest.skip(NOT_LORA[name])
    published = config_of(name)
    gate = GATES.build(
        published.gate, published.gate_options, num_experts=1, top_k=1, in_features=1
    )
    if not gate.constant_for_one_expert:
        pytest.skip("the weight of a single expert isn't constant")
    one = {"num_experts": 1, "num_shared_experts": 0, "r": 4, "rank_wise": False, "top_k": None}
    ours = build(name, **one, scaling_rule="alpha/r", use_rslora=False)
    assert not routed_layers(ours)
    targets = published.target_modules
    lora = LoraConfig(r=4, lora_alpha=published.lora_alpha, target_modules=targets)
    theirs = get_peft_model(tiny_model("llama"), lora).eval()
    for site, layer in ours.named_modules():
        if isinstance(layer, MoloraLayer):
            twin, experts = theirs.get_submodule(site), layer.molora_experts["default"]
            twin.lora_A["default"].weight.data.copy_(experts.A)
            twin.lora_B["default"].weight.data.copy_(experts.B)
    batch = tiny_batch("llama")
    expected = logits_of(theirs, batch)
    torch.testing.assert_close(logits_of(ours, batch), expected, atol=1e-5, rtol=1e-5)


@every_method
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_change_no_token(name: str, build, side: str):
    if name in NOT_CAUSAL:
        pytest.skip(NOT_CAUSAL[name])
    model, config = build(name), config_of(name)

    def labelled(rows: list[list[int]], length: int) -> dict[str, Tensor]:
        batch = collate(rows, side, length)
        return {**batch, **labels_for(config, batch["input_ids"], batch["attention_mask"])}

    batched, _ = run(model, labelled(EIGHT, 9))
    for i, prompt in enumerate(EIGHT):
        alone, _ = run(model, labelled([prompt], len(prompt)))
        torch.testing.assert_close(batched[i], alone[0], atol=2e-5, rtol=1e-4)


@every_method
@torch.no_grad()
def test_packing_changes_no_token(name: str, build):
    if name in NOT_CAUSAL:
        pytest.skip(NOT_CAUSAL[name])
    model, config = build(name), config_of(name)
    rows = [torch.tensor([prompt]) for prompt in EIGHT]
    labels = [labels_for(config, row) for row in rows]
    alone = [
        model(row, use_cache=False, **own).logits for row, own in zip(rows, labels, strict=True)
    ]
    packed = {key: torch.cat([own[key] for own in labels], -1) for key in labels[0]}
    places = torch.cat([torch.arange(len(prompt)) for prompt in EIGHT])[None]
    # with a cache the attention of transformers doesn't see the boundaries
    logits = model(torch.cat(rows, 1), position_ids=places, use_cache=False, **packed).logits
    torch.testing.assert_close(logits, torch.cat(alone, 1), atol=2e-5, rtol=1e-4)


READS = {  # what a router or a loss may need of a batch, and what the message about it says
    "task_ids": ("the task of each sequence", "'task_ids'", "molora.RoutingLabelCollator"),
    "modality_ids": ("the modality of each token", "'modality_ids'", "molora.RoutingLabelCollator"),
    "prompt": ("which tokens are a prompt", "prompt_mask", "molora.RoutingLabelCollator"),
    "input_ids": ("the tokens' ids", "input_ids instead of inputs_embeds"),
}


@pytest.mark.parametrize(
    ("name", "need"),
    [
        (name, need)
        for name in available_methods()
        for need in sorted(needs_of(config_of(name)) & READS.keys())
    ],
)
def test_what_a_batch_lacks_is_named(name: str, need: str, tiny_model):
    model = get_peft_model(tiny_model("llama"), config_of(name)).train()
    ids = torch.tensor(PROMPTS[:1])
    batch = {"input_ids": ids, **labels_for(config_of(name), ids)}
    model(**batch, use_cache=False)
    if need == "input_ids":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    else:
        del batch[{"task_ids": "routing_task_ids", "prompt": "prompt_mask"}.get(need, need)]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        model(**batch, use_cache=False)
    assert all(part in str(caught.value) for part in READS[need])


@every_method
@torch.no_grad()
def test_decoding_with_a_cache_equals_one_pass(name: str, build):
    if name in NOT_CAUSAL:
        pytest.skip(NOT_CAUSAL[name])
    model, ids = build(name), torch.tensor(PROMPTS[:1])
    labels = labels_for(config_of(name), ids)

    def step(start: int, stop: int, cache: Any) -> Any:
        part = {k: v[:, start:stop] if v.dim() == 2 else v for k, v in labels.items()}
        part.pop("prompt_mask", None)  # what fills an empty cache is the prompt
        mask = torch.ones(1, stop)
        return model(ids[:, start:stop], mask, past_key_values=cache, use_cache=True, **part)

    output = step(0, PROMPT, None)
    logits = [output.logits]
    for t in range(PROMPT, ids.shape[1]):
        output = step(t, t + 1, output.past_key_values)
        logits.append(output.logits)
    expected = model(input_ids=ids, **labels).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=2e-5, rtol=1e-4)


@every_method
def test_a_forward_pass_changes_no_state(name: str, build, batch_for):
    model, batch = build(name), batch_for(name)
    before = state_of(model)
    for mode in (model.eval, model.train):
        mode()
        model(**batch).loss.backward()
        assert_same_state(model, before)


@every_method
def test_a_saved_adapter_is_the_same(name: str, build, batch_for, logits_of, tiny_model, tmp_path):
    model, batch = build(name).train(), batch_for(name)
    model(**batch).loss.backward()
    molora.after_step(model, 0.5)  # so that what the method remembers isn't what it starts with
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert loaded.peft_config["default"].method == name
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
    assert_same_state(loaded, state_of(model))


@every_method
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
def test_checkpointing_changes_no_gradient(name: str, build, batch_for, reentrant: bool):
    model, batch = build(name).train(), batch_for(name)
    expected = gradients(model, batch)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    actual = gradients(model, batch)
    assert expected
    for key, grad in expected.items():
        torch.testing.assert_close(actual[key], grad, atol=1e-5, rtol=1e-4, msg=key)


@cache
def word_tokenizer() -> PreTrainedTokenizerBase:
    return tokenizer()


@every_method
def test_it_learns(name: str, tiny_model, tmp_path: Path):
    patterns = [[5, 9, 30] * 3, [44, 17, 8] * 3]
    rows = {"input_ids": patterns * 4, "task_ids": [0, 1] * 4}
    labels = labels_for(config_of(name), torch.tensor(rows["input_ids"]))
    rows |= {key: value.tolist() for key, value in labels.items() if value.dim() == 2}
    rate = RATES.get(name, 1e-2)
    options = {"num_train_epochs": 6, "learning_rate": rate, "per_device_train_batch_size": 4}
    torch.manual_seed(0)
    trainer = SFTTrainer(
        tiny_model("llama"),
        SFTConfig(str(tmp_path), **{**QUIET, **options}, remove_unused_columns=False),
        train_dataset=Dataset.from_dict(rows),
        processing_class=word_tokenizer(),
        peft_config=config_of(name),
    )
    columns = [key for key in rows if key != "input_ids"]
    trainer.data_collator = RoutingLabelCollator(trainer.data_collator, *columns)
    parameters = dict(trainer.model.named_parameters())
    trainable = {key for key, value in parameters.items() if value.requires_grad}
    before = {key: value.detach().clone() for key, value in parameters.items()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert sum(losses[-2:]) < 0.96 * sum(losses[:2])
    moved = {key for key, value in parameters.items() if not torch.equal(value, before[key])}
    may_rest = {key for key in trainable for part in AT_REST.get(name, ()) if part in key}
    assert moved - trainable == set()
    assert trainable - moved - may_rest == set()
