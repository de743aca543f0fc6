"""Prompts merged for decoding: the tokens of whole passes, by fewer modules, or not at all."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import molora
from molora import Experts, Gate, MoloraConfig, Router, Routing, SiteInput
from molora.layer import adapted_layers
from molora.passes import Pass
from molora.prompt_merging import PromptMerges

from .test_generation import NEW, PROMPTS, generate, padded

# Of each kind of factors: apart, of one module each, shared, mixed, behind a constant correction.
BY_PROMPT: dict[str, dict[str, Any]] = {
    "octavius": {},
    "smear": {},
    "meo": {},
    "milora": {},
    "ttmm": {
        "method": "octavius",
        "router": "centroid",
        "router_options": {"temperature": 0.04},
        "gate": "threshold",
        "gate_options": {"threshold": 0.01},
        "top_k": None,
    },
    "one A": {"method": "smear", "experts": "shared_a"},
    "one B": {"method": "smear", "experts": "shared_b"},
    "pieces of the base weight": {
        "method": "meo",
        "experts": "svd_segments",
        "top_k": 2,
        "num_experts": 4,
    },
    "shared experts": {
        "method": "smear",
        "num_shared_experts": 2,
        "num_experts": 4,
        "r": {".*": [1, 2, 3, 2]},
    },
    "pairs of vectors": {"method": "smear", "experts": "rank_pairs", "r": 1},
}
BY_TASK: dict[str, dict[str, Any]] = {"moelora-task": {}, "poly": {}, "mhr": {}}
every_case = pytest.mark.parametrize("name", [*BY_PROMPT, *BY_TASK])
# The base model's norms and rotations are in fp32, whatever its dtype; a wrong merge is off by 0.1.
CLOSE = {"rtol": 0, "atol": 5e-5}
TASKS = torch.tensor([2, 0, 1])


@pytest.fixture
def build(tiny_model, randomize):
    """`build(name)`: a tiny Llama in fp64, whose decisions differ by the prompt or the task."""

    def make(name: str, **overrides: Any) -> Any:
        fields = {"r": 2, "task_type": "CAUSAL_LM", **BY_PROMPT.get(name, {}), **overrides}
        if name in ("smear", "one A", "one B"):
            fields["num_experts"] = 4
        if name in BY_TASK:
            fields["router_options"] = {"num_tasks": 3}
        config = MoloraConfig.from_method(fields.pop("method", name), **fields)
        model = get_peft_model(tiny_model("llama").double(), config, autocast_adapter_dtype=False)
        model = randomize(model.double().eval())
        for key, parameter in model.named_parameters():
            if "molora_router" in key:
                parameter.data *= 20
        return model

    return make


class Runs:
    """Counts the runs of a model's routers and experts."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        for module in model.modules():
            if isinstance(module, Router | Experts):
                module.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1

    @torch.no_grad()
    def of(self, call: Any) -> int:
        before = self.count
        call()
        return self.count - before


def inputs(name: str, rows: list[list[int]], **more: Any) -> dict[str, Tensor]:
    """A batch, with the tasks of its rows where they decide."""
    tasks = {"routing_task_ids": TASKS[: len(rows)]} if name in BY_TASK else {}
    return {**padded(rows), **tasks, **more}


@torch.no_grad()
def decoded(model: Any, name: str, rows: list[list[int]], answers: Tensor) -> Tensor:
    """(batch, NEW, vocabulary) logits of the answers' tokens, one pass each."""
    batch = inputs(name, rows)
    output, logits = model(**batch, use_cache=True), []
    for column in answers.T:
        mask = torch.cat([batch["attention_mask"], torch.ones(len(rows), 1)], 1)
        batch = {**batch, "attention_mask": mask, "input_ids": column[:, None]}
        output = model(**batch, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


@torch.no_grad()
def in_whole(model: Any, name: str, rows: list[list[int]], answers: Tensor) -> Tensor:
    """The same from one pass over the prompts and answers, each by itself and without a cache."""
    logits = []
    for number, (row, answer) in enumerate(zip(rows, answers.tolist(), strict=True)):
        ids = torch.tensor([row + answer])
        mask = torch.arange(ids.shape[1])[None] < len(row)
        tasks = {"routing_task_ids": TASKS[number, None]} if name in BY_TASK else {}
        logits.append(model(ids, prompt_mask=mask, **tasks).logits[0, len(row) :])
    return torch.stack(logits)


@every_case
@pytest.mark.parametrize("count", [1, 3])
def test_logits_are_those_of_whole_passes_and_nothing_is_routed(name: str, count: int, build):
    model, rows = build(name), PROMPTS[:count]
    answers = torch.randint(3, 60, (count, NEW), generator=torch.Generator().manual_seed(count))
    runs = Runs(model)
    one_pass = runs.of(lambda: model(**inputs(name, rows), use_cache=True))
    merged = []
    # The prompts' pass, and the first that continues it; in the other NEW - 1 nothing runs.
    assert runs.of(lambda: merged.append(decoded(model, name, rows, answers))) == 2 * one_pass
    expected = in_whole(model, name, rows, answers)
    torch.testing.assert_close(merged[0], expected, **CLOSE)
    with molora.unmerged_prompts(model):
        routed = []
        every = runs.of(lambda: routed.append(decoded(model, name, rows, answers)))
    assert every == (1 + NEW) * one_pass
    torch.testing.assert_close(merged[0], routed[0], rtol=0, atol=1e-6)


@every_case
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_generation_gives_the_same_tokens(name: str, options: dict, build):
    model, runs = build(name), None
    batch = padded(PROMPTS)

    def run() -> Tensor:
        torch.manual_seed(0)
        return generate(model, batch, **options)

    with molora.routing_labels(model, task_ids=TASKS):
        merged = run()
        with molora.unmerged_prompts(model):
            assert run().tolist() == merged.tolist()
        runs = Runs(model)
        few = runs.of(run)
        with molora.unmerged_prompts(model):
            assert runs.of(run) > 2 * few


def test_drafts_are_verified_by_merged_prompts(build, tiny_model):
    model, assistant = build("smear"), tiny_model("llama").double()
    runs = Runs(model)
    for prompt in PROMPTS:
        with molora.unmerged_prompts(model):
            expected = generate(model, padded([prompt]), assistant_model=assistant)
            every = runs.of(
                lambda prompt=prompt: generate(model, padded([prompt]), assistant_model=assistant)
            )
        few = runs.of(
            lambda prompt=prompt: generate(model, padded([prompt]), assistant_model=assistant)
        )
        found = generate(model, padded([prompt]), assistant_model=assistant)
        assert found.tolist() == expected.tolist() and few < every


@torch.no_grad()
def test_copies_of_a_cache_share_the_factors_and_generations_may_alternate(build):
    model, rows = build("smear"), PROMPTS[:2]
    answers = torch.randint(3, 60, (2, NEW), generator=torch.Generator().manual_seed(1))
    caches = []
    for row, answer in zip(rows, answers, strict=True):
        cache = model(torch.tensor([row]), use_cache=True).past_key_values
        model(answer[None, :1], past_key_values=cache, use_cache=True)
        caches.append(cache)
    twin = copy.deepcopy(caches[0])
    assert twin.molora_decisions.merges is caches[0].molora_decisions.merges
    expected = in_whole(model, "smear", rows, answers)
    for step in range(1, NEW):
        for number, cache in ((0, caches[0]), (1, caches[1]), (0, twin)):
            ids = answers[number, step][None, None]
            logits = model(ids, past_key_values=cache, use_cache=True).logits[0, -1]
            torch.testing.assert_close(logits, expected[number, step], **CLOSE)


def all_experts(model: Any) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


@torch.no_grad()
def test_they_go_with_the_cache_and_leave_no_trace(build):
    model = build("milora")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    cache = model(torch.tensor(PROMPTS[:1]), use_cache=True).past_key_values
    model(torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    merges = cache.molora_decisions.merges
    held = [weakref.ref(merges.factors(experts)) for experts in all_experts(model)]
    assert len(held) == 14
    del cache, merges
    gc.collect()
    assert not any(factors() is not None for factors in held)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys


def halve(model: Any, in_place: bool) -> None:
    """Half of each of the adapter's parameters, in the same tensors or in others."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and in_place:
                parameter.mul_(0.5)
            elif parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(0.5 * parameter))


@pytest.mark.parametrize("what", ["experts", "other tensors", "tasks"])
@torch.no_grad()
def test_they_are_made_anew_when_what_they_were_made_of_changes(what: str, build):
    model, rows = build("moelora-task"), PROMPTS[:1]
    other = build("moelora-task")
    tasks = [torch.tensor([2]), torch.tensor([2])]
    if what == "tasks":
        tasks[1] = torch.tensor([0])
    else:
        halve(other, in_place=True)
    cache = model(**padded(rows), routing_task_ids=tasks[0], use_cache=True).past_key_values
    for _ in range(2):
        model(torch.tensor([[7]]), past_key_values=cache, routing_task_ids=tasks[0], use_cache=True)
    if what != "tasks":
        halve(model, in_place=what == "experts")
    for _ in range(2):
        twin = copy.deepcopy(cache)
        ids = {"input_ids": torch.tensor([[9]]), "routing_task_ids": tasks[1], "use_cache": True}
        found = model(**ids, past_key_values=cache).logits
        with molora.unmerged_prompts(other):
            expected = other(**ids, past_key_values=twin).logits
        torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_what_a_site_borrows_is_watched_without_the_site_that_lends_it(build):
    """As in a model of two towers, whose pass may leave out the one that comes first."""
    model, given = build("smear", experts="up_bank", num_experts=4), Pass(batch=1)
    layers = adapted_layers(model)
    lender, borrower = (layers[f"model.layers.{i}.self_attn.q_proj"] for i in range(2))
    experts: Any = borrower.molora_experts["default"]
    assert "bank" not in dict(experts.named_children())
    merges, logits = PromptMerges(sequences=1, task_ids=None), torch.zeros(1, 4)
    inputs = SiteInput(torch.zeros(1, 32), experts=experts, adapter="default")
    merges.collect(None, Routing(logits.softmax(-1), logits), inputs)
    assert merges.collected().hold(given)
    lent: Any = lender.molora_experts["default"]
    lent.bank.weight.mul_(2)
    assert not merges.hold(given)


@torch.no_grad()
def test_a_cache_expanded_by_hand_is_refused_as_where_nothing_is_merged(build):
    model, batch = build("smear"), padded(PROMPTS[:2])
    cache = model(**batch, use_cache=True).past_key_values
    for _ in range(2):
        ones = torch.ones(2, 1, dtype=torch.long)
        batch = {
            "input_ids": 7 * ones,
            "attention_mask": torch.cat([batch["attention_mask"], ones], 1),
        }
        model(**batch, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1)
    with pytest.raises(RuntimeError, match="filled by 2 sequences with 4"):
        model(torch.full((4, 1), 7), past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_an_emptied_cache_forgets_its_prompt(build):
    model = build("moelora-task")
    cache = None
    for task, prompt in zip(TASKS, PROMPTS, strict=True):
        tasks = {"routing_task_ids": task[None]}
        if cache is not None:
            cache.reset()
        cache = model(
            torch.tensor([prompt]), **tasks, past_key_values=cache, use_cache=True
        ).past_key_values
        for _ in range(2):
            logits = model(
                torch.tensor([[7]]), **tasks, past_key_values=cache, use_cache=True
            ).logits
        expected = model(torch.tensor([[*prompt, 7, 7]]), **tasks).logits[:, -1:]
        torch.testing.assert_close(logits, expected, **CLOSE)


@molora.register_gate("reads_each_token")
class ReadsEachToken(Gate):
    """A gate whose weights depend on the token beside its logits."""

    def forward(self, logits: Tensor, inputs: molora.SiteInput) -> molora.Routing:
        weights = logits.softmax(-1) * inputs.hidden[:, :1].sigmoid()
        return molora.Routing(weights=weights, logits=logits)


OFF: dict[str, dict[str, Any]] = {
    "a gate reads the token": {"method": "smear", "gate": "reads_each_token", "gate_options": {}},
    "a gate of the library does": {"method": "smear", "gate": "decoupled", "gate_options": {}},
    "the router reads the token": {"method": "mola", "num_experts": 3},
    "experts are not linear": {"method": "smear", "experts": "residual_tree", "num_experts": 4},
    "experts are whole networks": {
        "method": "smear", "mixing": "feed_forward", "target_modules": ["up_proj", "down_proj"],
    },
    "one module in a layer has an adapter": {
        "method": "milora", "num_experts": 8, "expert_options": {
            "modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                        "down_proj"], "adapter": "down_proj"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OFF)
def test_where_it_would_not_be_exact_every_token_is_routed(name: str, build):
    model = build(name, **OFF[name])
    answers = torch.randint(3, 60, (2, NEW), generator=torch.Generator().manual_seed(2))
    runs = Runs(model)
    one_pass = runs.of(lambda: model(**padded(PROMPTS[:2]), use_cache=True))
    found = []
    every = runs.of(lambda: found.append(decoded(model, name, PROMPTS[:2], answers)))
    assert every == (1 + NEW) * one_pass
    expected = in_whole(model, name, PROMPTS[:2], answers)
    torch.testing.assert_close(found[0], expected, **CLOSE)
