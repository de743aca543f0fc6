"""Generation with decisions that are made once for a prompt: every way of decoding gives the tokens
that whole passes with the same prompt give."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import molora
from molora import MoloraConfig

METHODS = ("octavius", "smear")  # one router for the model, and one for each module
NEW = 6
PROMPTS = [[5, 9, 33, 12, 60, 7, 21], [44, 3, 17], [8, 8, 50, 31, 29]]

every_method = pytest.mark.parametrize("name", METHODS)
many_methods = pytest.mark.parametrize("name", [*METHODS, "meo", "milora"])


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Left-padded, as for generation."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """The new tokens, always as many."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    output = model.generate(**batch, **options, pad_token_id=0)
    return output[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
def greedy_without_cache(model: Any, prompt: list[int], count: int = NEW) -> list[int]:
    """The same, from a whole pass for each token."""
    row = list(prompt)
    for _ in range(count):
        mask = torch.arange(len(row))[None] < len(prompt)
        row.append(int(model(torch.tensor([row]), prompt_mask=mask).logits[0, -1].argmax()))
    return row[len(prompt) :]


@torch.no_grad()
def score(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Log-probability of an answer, from one whole pass."""
    ids = torch.tensor([prompt + answer])
    mask = torch.arange(ids.shape[1])[None] < len(prompt)
    logits = model(ids, prompt_mask=mask).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logits.gather(-1, torch.tensor(answer)[:, None]).sum())


@many_methods
def test_greedy_decoding_equals_whole_passes(name: str, build_by_prompt):
    model = build_by_prompt(name)
    expected = [greedy_without_cache(model, prompt) for prompt in PROMPTS]
    assert generate(model, padded(PROMPTS)).tolist() == expected  # a batch, padded on the left
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert generate(model, padded([prompt])).tolist() == [tokens]


def test_the_prompt_decides(build_by_prompt):
    # or the tests above would hold for any router
    model = build_by_prompt("smear")
    prompt = PROMPTS[0]
    ids = torch.tensor([[*prompt, *greedy_without_cache(model, prompt)]])
    short = torch.arange(ids.shape[1])[None] < 2
    whole = torch.arange(ids.shape[1])[None] < len(prompt)
    with torch.no_grad():
        one, two = (model(ids, prompt_mask=mask).logits for mask in (short, whole))
    assert (one - two).abs().max() > 0.01


@many_methods
def test_beam_search(name: str, build_by_prompt):
    model = build_by_prompt(name)
    options = {"num_beams": 3, "length_penalty": 0.0}
    together = generate(model, padded(PROMPTS), **options)
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        output = model.generate(
            **padded([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            pad_token_id=0, return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
        answer = output.sequences[0, len(prompt) :].tolist()
        assert tokens.tolist() == answer
        assert output.sequences_scores[0].item() == pytest.approx(
            score(model, prompt, answer), abs=1e-3
        )


@many_methods
def test_several_samples_of_a_prompt(name: str, build_by_prompt):
    model = build_by_prompt(name)
    torch.manual_seed(0)
    output = model.generate(
        **padded(PROMPTS[:2]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0,
        num_return_sequences=3, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    answers = output.sequences[:, len(PROMPTS[0]) :].tolist()
    logits = torch.stack(output.logits, 1).log_softmax(-1)
    for row, answer in enumerate(answers):
        found = logits[row].gather(-1, torch.tensor(answer)[:, None]).sum().item()
        assert found == pytest.approx(score(model, PROMPTS[row // 3], answer), abs=1e-3)


@many_methods
def test_assisted_generation(name: str, build_by_prompt, tiny_model):
    model, assistant = build_by_prompt(name), tiny_model("llama")
    for prompt in PROMPTS:
        expected = greedy_without_cache(model, prompt)
        assert generate(model, padded([prompt]), assistant_model=assistant).tolist() == [expected]
        lookup = generate(model, padded([prompt]), prompt_lookup_num_tokens=2)
        assert lookup.tolist() == [expected]


@every_method
@torch.no_grad()
def test_generations_may_alternate(name: str, build_by_prompt):
    model = build_by_prompt(name)
    alone = [greedy_without_cache(model, prompt, 3) for prompt in PROMPTS]
    caches: list[Any] = [None] * len(PROMPTS)
    rows = [torch.tensor([prompt]) for prompt in PROMPTS]
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for _ in range(3):
        for i in range(len(PROMPTS)):
            output = model(rows[i], past_key_values=caches[i], use_cache=True)
            caches[i], rows[i] = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens[i].append(int(rows[i]))
    assert tokens == alone


@every_method
@torch.no_grad()
def test_the_decision_goes_with_a_copy_of_the_cache_and_outlives_a_rewind(
    name: str, build_by_prompt
):
    model, prompt = build_by_prompt(name), PROMPTS[0]
    expected = greedy_without_cache(model, prompt, 3)
    first = model(torch.tensor([prompt]), use_cache=True)
    again = copy.deepcopy(first.past_key_values)
    for cache in (first.past_key_values, again):
        ids = torch.tensor([expected[:2]])
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=2)
        assert output.logits.argmax(-1)[0].tolist() == expected[1:]
        output.past_key_values.crop(-2)
        output = model(ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
        assert int(output.logits.argmax()) == expected[1]


@every_method
@torch.no_grad()
def test_a_given_cache_may_be_used_again_after_a_reset(name: str, build_by_prompt):
    model = build_by_prompt(name)
    cache = DynamicCache()
    for prompt in PROMPTS[:2]:
        output = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache
        token = output.logits[:, -1:].argmax(-1)
        second = model(token, past_key_values=cache, use_cache=True).logits.argmax()
        assert [int(token), int(second)] == greedy_without_cache(model, prompt, 2)
        cache.reset()


@every_method
def test_a_static_cache(name: str, build_by_prompt):
    model, batch = build_by_prompt(name), padded(PROMPTS)
    expected = generate(model, batch).tolist()
    with pytest.raises(RuntimeError, match=r"which tokens are padding.*molora\.routing_labels"):
        generate(model, batch, cache_implementation="static", disable_compile=True)
    with molora.routing_labels(model, prompt_mask=batch["attention_mask"]):
        found = generate(model, batch, cache_implementation="static", disable_compile=True)
    assert found.tolist() == expected
    alone = generate(
        model, padded(PROMPTS[:1]), cache_implementation="static", disable_compile=True
    )
    assert alone.tolist() == expected[:1]


@every_method
@torch.no_grad()
def test_a_cache_without_a_decision_is_refused(name: str, build_by_prompt):
    model, ids = build_by_prompt(name), torch.tensor(PROMPTS[:1])
    with model.disable_adapter():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="carries no decision.*empty cache"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    cache = model(ids, use_cache=True).past_key_values
    for layer in cache.layers:  # past the cache's own methods, which tell what was decided
        layer.batch_repeat_interleave(2)
    with pytest.raises(RuntimeError, match=r"by 1 sequences with 2\. Expand the prompts before"):
        model(ids[:, :1].repeat(2, 1), past_key_values=cache, use_cache=True)


@every_method
@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_decisions_follow_the_rows_of_a_cache(name: str, merged: bool, build_by_prompt):
    model, ids = build_by_prompt(name), torch.tensor([prompt[:3] for prompt in PROMPTS])
    first, second = torch.tensor([[9]]), torch.tensor([[3], [4], [5], [6]])

    def read(rows: list[int]) -> DynamicCache:
        cache = model(ids[rows], use_cache=True).past_key_values
        if merged:  # this is the pass that collects
            model(first.expand(len(rows), 1), past_key_values=cache, use_cache=True)
        return cache

    def check(cache: DynamicCache, rows: list[int]) -> None:
        found = model(second[: len(rows)], past_key_values=cache, use_cache=True).logits
        alone = [
            model(token[None], past_key_values=read([row]), use_cache=True).logits
            for row, token in zip(rows, second, strict=False)
        ]
        torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)

    for method, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 1]), [2, 0, 1]),
        ("batch_select_indices", torch.tensor([2, 1]), [2, 1]),
        ("batch_select_indices", torch.tensor([False, True, True]), [1, 2]),
    ):
        cache = read([0, 1, 2])
        getattr(cache, method)(argument)
        check(cache, rows)
    cache = read([0, 1])
    cache.batch_repeat_interleave(2)
    check(cache, [0, 0, 1, 1])


@every_method
@torch.no_grad()
def test_a_prompt_in_parts_is_refused(name: str, build_by_prompt):
    model, ids = build_by_prompt(name), torch.tensor(PROMPTS[:1])
    with pytest.raises(RuntimeError, match="may belong to the prompt.*no prefill_chunk_size"):
        generate(model, padded(PROMPTS[:1]), prefill_chunk_size=4)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="by 3 tokens that may belong to the prompt"):
        model(ids[:, 4:], past_key_values=cache, use_cache=True)
    mask = torch.ones_like(ids)
    with molora.routing_labels(model, prompt_mask=mask), pytest.raises(RuntimeError, match="as a"):
        model(ids[:, :4], use_cache=True)
    # tokens that are said not to be of the prompt are no prompt
    expected = model(ids, prompt_mask=torch.arange(7)[None] < 4).logits[:, 4:]
    cache = model(ids[:, :4], use_cache=True).past_key_values
    zeros = torch.zeros(1, 3)
    actual = model(ids[:, 4:], past_key_values=cache, use_cache=True, prompt_mask=zeros).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@every_method
def test_without_a_cache_somebody_must_name_the_prompt(name: str, build_by_prompt):
    model, batch = build_by_prompt(name), padded(PROMPTS)
    with pytest.raises(ValueError, match="nothing says which tokens are a prompt: train on"):
        generate(model, batch, use_cache=False)
    with molora.routing_labels(model, prompt_mask=batch["attention_mask"]):
        found = generate(model, batch, use_cache=False)
    assert found.tolist() == generate(model, batch).tolist()


def test_adapters_of_one_batch_keep_their_own_decisions(build_by_prompt):
    model = build_by_prompt("smear")
    other = MoloraConfig.from_method("smear", r=3, num_experts=3, init_lora_weights=False)
    model.add_adapter("other", other)
    model.eval()
    expected = []
    for prompt, adapter in zip(PROMPTS, ["other", "default", "other"], strict=True):
        model.set_adapter(adapter)
        expected.append(generate(model, padded([prompt]))[0].tolist())
    model.set_adapter("default")
    names = {"adapter_names": ["other", "default", "other"]}
    assert generate(model, padded(PROMPTS), **names).tolist() == expected
    beams = generate(model, padded(PROMPTS), **names, num_beams=2)
    assert beams.shape == (3, NEW)


def test_labels_for_generate_go_to_every_beam_and_step(build_by_prompt):
    model = build_by_prompt("moelora-task", num_experts=4, router_options={"num_tasks": 3})
    tasks = torch.tensor([2, 0, 1])
    batch = padded(PROMPTS)
    with pytest.raises(ValueError, match=r"'task_embedding' needs the task.*routing_labels"):
        generate(model, batch)
    expected = []
    for prompt, task in zip(PROMPTS, tasks, strict=True):
        with molora.routing_labels(model, task_ids=task[None]):
            expected.append(generate(model, padded([prompt]), num_beams=2)[0].tolist())
    with molora.routing_labels(model, task_ids=tasks):
        assert generate(model, batch, num_beams=2).tolist() == expected
    with pytest.raises(ValueError, match="needs the task"):
        generate(model, batch)  # they end with the block


def test_generated_tokens_are_text(build_by_prompt):
    model = build_by_prompt("moiie", num_experts=4)
    ids = torch.tensor([PROMPTS[0]])
    modality = torch.tensor([[0, 1, 1, 1, 0, 0, 0]])
    with molora.routing_labels(model, modality_ids=modality):
        tokens = generate(model, padded(PROMPTS[:1]))[0].tolist()
    row = torch.cat([ids, torch.tensor([tokens])], 1)
    whole = torch.nn.functional.pad(modality, (0, NEW))
    with torch.no_grad():
        logits = model(row, modality_ids=whole).logits
    assert logits[0, ids.shape[1] - 1 : -1].argmax(-1).tolist() == tokens


def test_labels_have_names(build_by_prompt):
    model = build_by_prompt("smear")
    with pytest.raises(ValueError, match=r"unknown label 'task_id'.*mean 'task_ids'"):  # noqa: SIM117
        with molora.routing_labels(model, task_id=torch.tensor([0])):
            pass
    with pytest.raises(ValueError, match="task_ids='x' must be a tensor"):  # noqa: SIM117
        with molora.routing_labels(model, task_ids="x"):
            pass
    with pytest.raises(ValueError, match="no MoLoRA layer"):  # noqa: SIM117
        with molora.routing_labels(torch.nn.Linear(2, 2), task_ids=torch.tensor([0])):
            pass
