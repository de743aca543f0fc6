"""Bringing the task of each sample from a dataset's column to the losses that need it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class TaskIdCollator:
    """A data collator that hands on each sample's task id and leaves the rest to another collator.

        arguments = SFTConfig(remove_unused_columns=False, ...)
        trainer = SFTTrainer(model, arguments, train_dataset=rows, peft_config=config)
        trainer.data_collator = TaskIdCollator(trainer.data_collator)

    The same goes for `transformers.Trainer`. `remove_unused_columns=False` keeps the trainer from
    dropping the column, which the model's forward doesn't name. Samples must stay apart: packing
    mixes tasks in one row, and then the column is gone.

    The ids reach the model as `routing_task_ids` (batch,), because PEFT's model classes keep an
    argument called `task_ids` for themselves; losses and routers read them as
    `inputs.labels["task_ids"]`.

    Args:
        collator: makes the rest of the batch from the samples without the column.
        column: the column with the ids, whole numbers from 0.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], column: str = "task_ids"
    ) -> None:
        self.collator = collator
        self.column = column

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of `collator`, and the ids as int64 (batch,).

        Raises:
            ValueError: a sample has no such column.
        """
        missing = next((sample for sample in samples if self.column not in sample), None)
        if missing is not None:
            raise ValueError(
                f"a sample has no column {self.column!r}, only {', '.join(sorted(missing))}; set "
                "remove_unused_columns=False in the training arguments, and packing=False."
            )
        rest = [{k: v for k, v in sample.items() if k != self.column} for sample in samples]
        batch = self.collator(rest)
        ids = [int(sample[self.column]) for sample in samples]
        return {**batch, "routing_task_ids": torch.tensor(ids)}
