"""The numbers by which routers and losses know the tasks of a mixture."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig

from molora import MoloraConfig
from molora.gates import GATES
from molora.routers import ROUTERS

FILE = "task_ids.json"


def readers(config: MoloraConfig, need: str = "task_ids") -> dict[str, int | None]:
    """What of the adapter reads a label, as "the loss 'x'", and the number of tasks it knows
    (None: any)."""
    router = ROUTERS.build(config.router, config.router_options, in_features=1, num_experts=2)
    parts = {
        f"the router {config.router!r}": router,
        f"the gate {config.gate!r}": GATES.get(config.gate),
        **{f"the loss {name!r}": loss for name, (_, loss) in config.build_losses().items()},
    }
    return {
        name: getattr(part, "num_tasks", getattr(part, "num_groups", None))
        for name, part in parts.items()
        if need in getattr(part, "needs", ())
    }


def number_tasks(
    names: Iterable[str], order: Iterable[str] | None, chosen: Mapping[str, int] | None
) -> dict[str, int]:
    """The id of each task.

    Args:
        names: the tasks that occur.
        order: of a mixture, as it was written; None where a column names the tasks, which are then
            numbered alphabetically.
        chosen: ids that the user gave instead; several tasks may share one.

    Raises:
        ValueError: `chosen` leaves a task out, or has an id that is not a whole number from 0.
    """
    names = set(names)
    if chosen is None:
        ordered = sorted(names) if order is None else [name for name in order if name in names]
        return {name: i for i, name in enumerate(ordered)}
    for name in sorted(names):
        if name not in chosen:
            raise ValueError(
                f"task_ids has no id for the task {name!r}; give one for each of: "
                f"{', '.join(sorted(names))}"
            )
    for name, number in chosen.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(
                f"task_ids: the id of {name!r} is {number!r}, not a whole number from 0."
            )
    return dict(chosen)


def ids_of_run(
    config: MoloraConfig,
    rows: Dataset,
    training: SFTConfig,
    order: Iterable[str] | None,
    chosen: Mapping[str, int] | None,
) -> dict[str, int] | None:
    """The id of each task of the training data; None where nobody reads it or gave any.

    Args:
        config: the adapter's.
        rows: the training data, with the column `task`.
        training: the training's arguments.
        order: see `number_tasks`.
        chosen: see `number_tasks`.

    Raises:
        ValueError: the ids don't survive packing, or are more than the adapter knows.
    """
    wanted = readers(config)
    if not wanted and chosen is None:
        return None
    who = ", ".join(wanted) or "task_ids"
    if training.packing or training.eval_packing:
        field = "packing" if training.packing else "eval_packing"
        raise ValueError(
            f"{field}=True puts several examples into one row and drops their tasks, which {who} "
            f"asks for; set {field}: false."
        )
    ids = number_tasks(rows.unique("task"), order, chosen)
    for name, number in wanted.items():
        if number is not None and max(ids.values()) >= number:
            raise ValueError(
                f"{name} knows {number} tasks, numbered from 0, but the data has the ids {ids}; "
                "set its number of tasks, or let tasks share ids: task_ids: {NAME: ID, ...}"
            )
    return ids


def add_task_ids(rows: Dataset, ids: Mapping[str, int]) -> Dataset:
    """A column `task_ids` beside `task`.

    Raises:
        ValueError: a task has no id.
    """
    for name in rows.unique("task"):
        if name not in ids:
            raise ValueError(f"the task {name!r} has no id; those with one: {', '.join(ids)}")
    return rows.add_column("task_ids", [ids[task] for task in rows["task"]])


def keep_task_ids(
    ids: Mapping[str, int], folder: str | Path, *, resumed: bool, writes: bool
) -> None:
    """Write the ids beside the adapter, whose user needs them too.

    Args:
        ids: of the run.
        folder: its output_dir.
        resumed: whether the run goes on from a checkpoint.
        writes: whether this process is the one that writes.

    Raises:
        ValueError: a run that is resumed had other ids.
    """
    path = Path(folder) / FILE
    if resumed and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != ids:
            raise ValueError(
                f"the run that is resumed knew its tasks by {before} ({path}), and this one by "
                f"{dict(ids)}; give the former as task_ids."
            )
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
