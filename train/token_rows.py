"""Examples that are tokenised already, with labels for routing that have a value for each token."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from trl import SFTConfig

from molora import MoloraConfig
from task_ids import readers

# What is kept of a row beside its token ids, where the data has it.
OPTIONAL = ("labels", "modality_ids")
ROUTING = ("modality_ids",)  # those of them that routers and losses read


def is_tokenised(rows: Dataset) -> bool:
    """Whether the rows are token ids instead of text."""
    return "input_ids" in rows.column_names


def token_row_converter(
    task: str, path: str, column: str, columns: list[str]
) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """What makes of a row of the data a row of `input_ids`, `task` and what it has of `OPTIONAL`.

    Args:
        task: of rows that name none.
        path: of the data, for messages.
        column: that of the token ids.
        columns: all that the data has.

    Raises:
        ValueError: there is no such column, or, from the converter, a row is empty or has not one
            value for each of its tokens.
    """
    if column not in columns:
        raise ValueError(
            f"task {task!r}: {path!r} has no column {column!r}; its columns: {', '.join(columns)}"
        )
    kept = [name for name in OPTIONAL if name in columns]

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        ids = row[column]
        if not isinstance(ids, list) or not ids or not all(type(value) is int for value in ids):
            raise ValueError(
                f"task {task!r}: row {index} has no token ids in {column!r}, but {ids!r}."
            )
        for name in kept:
            found = row[name]
            if not isinstance(found, list) or len(found) != len(ids):
                count = len(found) if isinstance(found, list) else found
                raise ValueError(
                    f"task {task!r}: row {index} has {count} values in {name!r} for {len(ids)} "
                    "tokens; give one for each."
                )
        named = str(row["task"]) if "task" in columns else task
        return {"input_ids": ids, **{name: row[name] for name in kept}, "task": named}

    return convert


def cut(rows: Dataset, training: SFTConfig) -> Dataset:
    """The rows as long as the trainer leaves `input_ids` and `labels`: it cuts no other column."""
    limit = training.max_length
    if limit is None:
        return rows
    columns = ["input_ids", *(name for name in OPTIONAL if name in rows.column_names)]
    kept = slice(limit) if training.truncation_mode == "keep_start" else slice(-limit, None)
    return rows.map(
        lambda row: {name: row[name][kept] for name in columns}, desc="Cutting to max_length"
    )


def columns_for_routing(config: MoloraConfig, rows: Dataset, training: SFTConfig) -> list[str]:
    """The columns of token labels that the adapter reads.

    Args:
        config: the adapter's.
        rows: the data.
        training: the training's arguments.

    Raises:
        ValueError: the data has no such column, or packing would drop it.
    """
    found = []
    for name in ROUTING:
        who = ", ".join(readers(config, name))
        if not who:
            continue
        if name not in rows.column_names:
            raise ValueError(
                f"{who} reads {name}, one for each token, which text has not; give tokenised data "
                f"with that column: dataset: {{path: ..., input_ids: COLUMN}}."
            )
        for field in ("packing", "eval_packing"):
            if getattr(training, field):
                raise ValueError(
                    f"{field}=True joins examples and drops {name}, which {who} reads; set "
                    f"{field}: false."
                )
        found.append(name)
    return found
