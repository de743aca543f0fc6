"""Bringing a dataset's columns to the routers and losses that need them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]
# PEFT's model classes keep an argument called task_ids for themselves.
ARGUMENTS = {"task_ids": "routing_task_ids"}
# Labels that are a vector of numbers for each sample.
VECTORS = ("expert_prior", "instance_scores", "request_embeddings")


class RoutingLabelCollator:
    """A data collator that hands on what routing needs and leaves the rest to another collator.

        arguments = SFTConfig(remove_unused_columns=False, ...)
        trainer = SFTTrainer(model, arguments, train_dataset=rows, peft_config=config)
        trainer.data_collator = RoutingLabelCollator(trainer.data_collator, "modality_ids")

    The same goes for `transformers.Trainer`. `remove_unused_columns=False` keeps the trainer from
    dropping the columns, which the model's forward doesn't name. Samples must stay apart: packing
    drops such columns before a collator sees them; padding-free batches are fine.

    A column holds a whole number for each sample ("task_ids"), a list with one for each of its
    tokens ("modality_ids", "prompt_mask"), or a vector of numbers ("expert_prior",
    "request_embeddings", "instance_scores"). Routers read them by the names of `labels`.

    Args:
        collator: makes the rest of the batch from the samples without the columns.
        columns: names of columns that are the names of labels too.
        labels: columns of other names: the label's name -> the column's.
    """

    def __init__(self, collator: Collator, *columns: str, **labels: str) -> None:
        self.collator = collator
        self.columns = {**{name: name for name in columns}, **labels}

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of `collator`, and each label as int64: (batch,), or in the shape of
        `input_ids`, with 0 for padding; vectors as fp32, (batch, size).

        Raises:
            ValueError: a sample has no such column, or not one value for each of its tokens, or
                vectors have unlike sizes.
        """
        for column in self.columns.values():
            missing = next((sample for sample in samples if column not in sample), None)
            if missing is not None:
                raise ValueError(
                    f"a sample has no column {column!r}, only {', '.join(sorted(missing))}; set "
                    "remove_unused_columns=False in the training arguments, and packing=False."
                )
        own = set(self.columns.values())
        rest = [{k: v for k, v in sample.items() if k not in own} for sample in samples]
        batch = self.collator(rest)
        found = {}
        for label, column in self.columns.items():
            values = [sample[column] for sample in samples]
            if label in VECTORS:
                found[label] = _of_samples(_stacked(column, values), batch)
            elif isinstance(values[0], list | tuple):
                found[ARGUMENTS.get(label, label)] = _by_token(column, values, batch)
            else:
                ids = torch.tensor([int(value) for value in values])
                found[ARGUMENTS.get(label, label)] = _of_samples(ids, batch)
        return {**batch, **found}


class TaskIdCollator(RoutingLabelCollator):
    """A `RoutingLabelCollator` for the task of each sample.

        trainer.data_collator = TaskIdCollator(trainer.data_collator)

    The ids reach the model as `routing_task_ids` (batch,), because PEFT's model classes keep an
    argument called `task_ids` for themselves; losses and routers read them as "task_ids".

    Args:
        collator: makes the rest of the batch from the samples without the column.
        column: the column with the ids, whole numbers from 0.
    """

    def __init__(self, collator: Collator, column: str = "task_ids") -> None:
        super().__init__(collator, task_ids=column)


def _stacked(column: str, values: list[Any]) -> Tensor:
    """(samples, size)."""
    vectors = [torch.as_tensor(value, dtype=torch.float32) for value in values]
    shapes = sorted({tuple(vector.shape) for vector in vectors})
    if len(shapes) > 1 or len(shapes[0]) != 1:
        raise ValueError(
            f"the column {column!r} has values of the shapes {shapes}; each sample needs one list "
            "of numbers, all of the same length."
        )
    return torch.stack(vectors)


def _of_samples(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """(batch, ...), again for each of the rows that the collator makes of one sample: DPO's puts
    the chosen answers first, then the rejected ones."""
    rows, count = batch.get("input_ids"), len(values)
    if isinstance(rows, Tensor) and len(rows) > count and len(rows) % count == 0:
        values = torch.cat([values] * (len(rows) // count))
    return values


def _by_token(column: str, values: list[Any], batch: dict[str, Any]) -> Tensor:
    """As `input_ids`: sample by sample where the attention mask says that tokens are real."""
    flat = torch.cat([torch.as_tensor(value).long() for value in values])
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        # Padding-free: one row, padded at its end if at all.
        mask = torch.zeros_like(ids)
        mask[0, : len(flat)] = len(ids) == 1
    if mask.shape != ids.shape or int(mask.sum()) != len(flat):
        raise ValueError(
            f"the column {column!r} has {len(flat)} values for the tokens of a batch whose "
            f"input_ids are {tuple(ids.shape)} with {int(mask.sum())} real ones; give one for each "
            "token, as the trainer tokenizes and truncates them."
        )
    result = torch.zeros_like(ids)
    result[mask.bool()] = flat.to(ids.dtype)
    return result
