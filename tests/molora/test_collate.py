"""Task ids from a dataset's column to the layers, under unmodified trainers."""

from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from molora import TaskIdCollator

from .routed_twin import routed_llama, tiny_config, tiny_llama
from .trainer_runs import QUIET, sequences, tokenizer

SAMPLES = 8
LOSSES = {"localized_balancing": 0.1}
DENSE = {"gate": "dense", "top_k": None}


def labelled(column: str):
    """Sequences whose first token says which task id they have."""
    rows = sequences(SAMPLES)
    return rows.add_column(column, [ids[0] % 2 for ids in rows["input_ids"]])


def listen(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input ids and task ids of every forward pass, as the base model's layers see them."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    base = model.get_base_model()
    context = base.model.layers[0].mlp.up_proj.routing_context

    def note(module, args, kwargs):
        seen.append((kwargs["input_ids"], context.labels()["task_ids"]))

    base.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def sft_trainer(folder: Path, rows, **options) -> SFTTrainer:
    return SFTTrainer(
        tiny_llama(),
        SFTConfig(folder, **{**QUIET, "remove_unused_columns": False, **options}),
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=tiny_config(LOSSES, **DENSE),
    )


def transformers_trainer(folder: Path, rows, **options) -> Trainer:
    return Trainer(
        routed_llama(LOSSES, **DENSE),
        TrainingArguments(folder, **{**QUIET, "remove_unused_columns": False, **options}),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
    )


@pytest.mark.parametrize("build", [sft_trainer, transformers_trainer])
@pytest.mark.parametrize("column", ["task_ids", "domain"])
def test_each_sample_brings_its_id(tmp_path: Path, build, column: str):
    trainer = build(tmp_path, labelled(column))
    trainer.data_collator = TaskIdCollator(trainer.data_collator, column)
    seen = listen(trainer.model)
    trainer.train()
    assert sum(len(ids) for ids, _ in seen) == 3 * SAMPLES  # three epochs
    for ids, task_ids in seen:
        assert task_ids.tolist() == (ids[:, 0] % 2).tolist()
    assert len({id for _, task_ids in seen for id in task_ids.tolist()}) == 2


def test_a_column_that_the_trainer_dropped(tmp_path: Path):
    trainer = sft_trainer(tmp_path, labelled("task_ids"), remove_unused_columns=True)
    trainer.data_collator = TaskIdCollator(trainer.data_collator)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()


def test_the_other_collator_never_sees_the_column():
    seen = []

    def rest(samples):
        seen.extend(samples)
        return {"x": torch.zeros(len(samples))}

    batch = TaskIdCollator(rest)([{"a": 1, "task_ids": 3}, {"a": 2, "task_ids": 0}])
    assert seen == [{"a": 1}, {"a": 2}]
    assert list(batch) == ["x", "routing_task_ids"]
    assert batch["routing_task_ids"].tolist() == [3, 0]
    assert batch["routing_task_ids"].dtype == torch.int64
