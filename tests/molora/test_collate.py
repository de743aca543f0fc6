"""Task ids from a dataset's column to the layers, under unmodified trainers."""

from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from molora import MoloraConfig, RoutingLabelCollator, TaskIdCollator

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
        seen.append((kwargs["input_ids"], context.given().labels["task_ids"]))

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


@pytest.mark.parametrize(
    "options", [{}, {"padding_free": True, "max_length": None}], ids=["padded", "padding-free"]
)
@pytest.mark.filterwarnings("ignore:.*padding-free.*:UserWarning")
def test_each_token_brings_its_label(tmp_path: Path, options: dict):
    rows = labelled("task_ids")
    rows = rows.add_column("odd", [[i % 2 for i in ids] for ids in rows["input_ids"]])
    config = MoloraConfig.from_method(
        "smar", router="modality_bias", num_experts=2, losses={}, target_modules=["up_proj"]
    )
    arguments = {**QUIET, "remove_unused_columns": False, **options}
    trainer = SFTTrainer(
        tiny_llama(),
        SFTConfig(tmp_path, **arguments),
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=config,
    )
    collator = RoutingLabelCollator(trainer.data_collator, "task_ids", modality_ids="odd")
    trainer.data_collator = collator
    seen = []
    base = trainer.model.get_base_model()
    layer = base.model.layers[0].mlp.up_proj

    def note(module, args, kwargs):
        given = module.routing_context.given()
        seen.append((given.input_ids, given.labels["modality_ids"], given.labels["task_ids"]))

    layer.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert sum(len(tasks) for *_, tasks in seen) == 3 * SAMPLES
    for ids, odd, tasks in seen:
        assert odd.tolist() == (ids % 2).tolist()  # padding is id 0
        assert len(ids) == (1 if options else len(tasks))


def test_a_label_of_tokens_of_another_length():
    collator = RoutingLabelCollator(DataCollatorForLanguageModeling(tokenizer(), mlm=False), "odd")
    samples = [{"input_ids": [5, 6, 7], "odd": [1, 0, 1]}, {"input_ids": [8], "odd": [0]}]
    assert collator(samples)["odd"].tolist() == [[1, 0, 1], [0, 0, 0]]
    for values in ([], [0, 1]):
        samples[1]["odd"] = values
        found = rf"'odd' has {3 + len(values)} values .* \(2, 3\) with 4 real ones"
        with pytest.raises(ValueError, match=found):
            collator(samples)


def test_a_row_without_a_mask_is_padded_at_its_end_and_several_are_refused():
    samples = [{"odd": [1, 0]}, {"odd": [1]}]
    one = RoutingLabelCollator(lambda samples: {"input_ids": torch.ones(1, 5)}, "odd")
    assert one(samples)["odd"].tolist() == [[1, 0, 1, 0, 0]]
    several = RoutingLabelCollator(lambda samples: {"input_ids": torch.ones(2, 3)}, "odd")
    with pytest.raises(ValueError, match=r"'odd' has 3 values .* \(2, 3\) with 0 real ones"):
        several(samples)


def test_padding_on_the_left_and_rows_of_a_preference():
    left = tokenizer()
    left.padding_side = "left"
    collator = RoutingLabelCollator(DataCollatorForLanguageModeling(left, mlm=False), "odd")
    samples = [{"input_ids": [5, 6, 7], "odd": [1, 0, 1]}, {"input_ids": [9], "odd": [1]}]
    assert collator(samples)["odd"].tolist() == [[1, 0, 1], [0, 0, 1]]

    def chosen_and_rejected(samples):
        return {"input_ids": torch.zeros(2 * len(samples), 3)}

    batch = TaskIdCollator(chosen_and_rejected)([{"task_ids": 4}, {"task_ids": 5}])
    assert batch["routing_task_ids"].tolist() == [4, 5, 4, 5]


def test_each_sample_brings_a_vector():
    collator = RoutingLabelCollator(
        DataCollatorForLanguageModeling(tokenizer(), mlm=False), expert_prior="wanted"
    )
    samples = [
        {"input_ids": [5, 6, 7], "wanted": [0.5, 0.25]},
        {"input_ids": [8], "wanted": [1.0, -2]},
    ]
    found = collator(samples)["expert_prior"]
    assert found.tolist() == [[0.5, 0.25], [1.0, -2.0]] and found.dtype == torch.float32
    samples[1]["wanted"] = [1.0]
    with pytest.raises(ValueError, match=r"'wanted' has values of the shapes \[\(1,\), \(2,\)\]"):
        collator(samples)
