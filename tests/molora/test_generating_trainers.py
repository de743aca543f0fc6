"""Trainers that generate what they train or evaluate on, with the model in training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import DistillationTrainer

import molora

from .routed_twin import (
    Twin,
    check_added_gradient,
    routed_llama,
)
from .trainer_runs import (
    AT_REST,
    BOTH,
    distillation_trainer,
    draw,
    grpo_trainer,
    probed,
    tokenizer,
)


@pytest.mark.parametrize("build", [grpo_trainer, distillation_trainer])
def test_the_losses_reach_the_gradient(build, tmp_path: Path):
    run = probed(build, tmp_path, gradient_accumulation_steps=4, max_steps=2)
    probe = check_added_gradient(run, Twin(routed_llama()), BOTH, windows=2)
    assert [len(calls) for calls in probe.windows] == [4, 4]
    assert not all(call["attention_mask"].all() for calls in probe.windows for call in calls)


def decisions(model: PeftModel, **batch: Any) -> dict[str, Tensor]:
    """(rows, columns, E) by site."""
    with torch.no_grad(), molora.observe(model) as records:
        model(**batch)
    rows = len(batch["input_ids"])
    return {site: record.weights.unflatten(0, (rows, -1)) for site, record in records.items()}


def test_a_policy_trains_by_the_decision_that_it_generated_by(tmp_path: Path):
    model = routed_llama(router="prompt_mean")
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            calls.append(dict(kwargs))

    handle = model.get_base_model().register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    grpo_trainer(tmp_path, model, [], **AT_REST, max_steps=1, gradient_accumulation_steps=2).train()
    handle.remove()
    assert len(calls) == 2
    for call in calls:
        ids, mask, labels = call["input_ids"], call["attention_mask"], call["labels"]
        prompt = int((labels != -100).int().argmax(-1)[0])  # the completion's first column
        assert prompt < ids.shape[1]
        trained = decisions(model, input_ids=ids, attention_mask=mask, labels=labels)
        generated = decisions(
            model, input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True
        )
        for site, weights in generated.items():
            torch.testing.assert_close(
                trained[site], weights[:, -1:].expand_as(trained[site]), msg=site
            )


class PromptDistillation(DistillationTrainer):
    """What the error about an unknown prompt advises."""

    def compute_loss(self, model, inputs, **kwargs):
        with molora.routing_labels(model, prompt_mask=inputs["prompt_mask"]):
            return super().compute_loss(model, inputs, **kwargs)


def test_a_trainer_that_keeps_the_prompt_to_itself(tmp_path: Path):
    options = {"learning_rate": 0.05, "max_steps": 1}
    run = distillation_trainer(tmp_path, routed_llama(router="prompt_mean"), [], **options)
    with pytest.raises(ValueError, match="override compute_loss"):
        run.train()
    model = routed_llama(router="prompt_mean")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    distillation_trainer(tmp_path, model, [], kind=PromptDistillation, **options).train()
    for name, value in before.items():
        assert not torch.equal(model.get_parameter(name), value), name


def test_evaluation_that_generates_is_given_the_tasks(tmp_path: Path, tiny_model):
    config = molora.MoloraConfig.from_method(
        "moelora-task", r=4, num_experts=2, target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM",
        router_options={"num_tasks": 2}, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(tiny_model("t5"), config)
    prompts = [ids[:3] for ids in draw(4, seed=1)]
    rows = {"input_ids": prompts, "labels": draw(4, seed=2), "task_ids": [0, 1, 0, 1]}
    own = {"predict_with_generate": True, "generation_max_length": 5}
    run = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            tmp_path, use_cpu=True, report_to=[], remove_unused_columns=False, **own
        ),
        data_collator=molora.TaskIdCollator(DataCollatorForSeq2Seq(tokenizer())),
    )
    found = run.predict(Dataset.from_dict(rows)).predictions
    for task in (0, 1):
        with molora.routing_labels(model, task_ids=torch.tensor([task])), torch.no_grad():
            ids = torch.tensor(prompts[task::2])
            expected = model.generate(input_ids=ids, max_length=5)
        assert found[task::2, :5].tolist() == expected.tolist()
    assert found[0::2].tolist() != found[1::2].tolist()
