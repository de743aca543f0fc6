"""Examples of named tasks, from any source, as TRL's prompt and completion."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from token_rows import is_tokenised, token_row_converter

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
TEXT_ROWS = Features({name: Value("string") for name in ("prompt", "completion", "task")})
FORMATS = ("auto", "chat", "plain")
Part = Literal["train", "eval"]


@dataclass(frozen=True)
class TaskSource:
    """Where the examples of a task come from.

    Attributes:
        path: a file (JSON, JSONL, Parquet, CSV), a folder or the name of a dataset on the Hub.
        name: configuration of a dataset on the Hub.
        split: split to train on.
        eval_path: file, folder or dataset to evaluate on, if it isn't `path`.
        eval_split: split to evaluate on. Without it and `eval_path` there is nothing to evaluate.
        prompt: column of the prompt, text or a list of messages.
        completion: column of the answer, text or a list of messages.
        messages: column of whole conversations, instead of the two before; the last message is the
            completion.
        input_ids: column of token ids, instead of text: the data is tokenised. Its columns `labels`
            (-100 where nothing is learnt) and `modality_ids` count too, one value for each token.
        weight: share of the mixture, relative to the other tasks; for all tasks of a mixture or for
            none. No example is repeated: the mixture is as large as the weights allow. Without
            weights every example is used.
        max_examples: use at most so many, drawn at random.
    """

    path: str
    name: str | None = None
    split: str = "train"
    eval_path: str | None = None
    eval_split: str | None = None
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str | None = None
    input_ids: str | None = None
    weight: float | None = None
    max_examples: int | None = None

    @classmethod
    def parse(cls, task: str, value: Any) -> "TaskSource":
        """From a YAML's value: a path, or a mapping of the attributes.

        Raises:
            ValueError: a key isn't known or a value is wrong.
        """
        if isinstance(value, str):
            return cls(path=value)
        if not isinstance(value, Mapping) or "path" not in value:
            raise ValueError(
                f"task {task!r}: {value!r} is neither a path nor a mapping that has one."
            )
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ValueError(
                f"task {task!r}: unknown key {unknown[0]!r}; known keys: {', '.join(known)}"
            )
        source = cls(**value)
        if source.messages is not None and source.input_ids is not None:
            raise ValueError(f"task {task!r}: give messages or input_ids, not both.")
        if source.weight is not None and not source.weight > 0:
            raise ValueError(f"task {task!r}: weight={source.weight!r} must be above 0.")
        if source.max_examples is not None and source.max_examples < 1:
            raise ValueError(
                f"task {task!r}: max_examples={source.max_examples!r} must be above 0."
            )
        return source


def load_mixture(
    tasks: Mapping[str, Any] | None,
    dataset: Any = None,
    part: Part = "train",
    only_tasks: list[str] | None = None,
    seed: int = 0,
) -> Dataset | None:
    """Load and mix the tasks, shuffled.

    Args:
        tasks: task name -> `TaskSource`, or what `TaskSource.parse` takes.
        dataset: instead, one source; its `task` column names the tasks, if it has one.
        part: "train", or "eval" for the sources' `eval_path` and `eval_split`.
        only_tasks: drop all other tasks.
        seed: of the subsets and of the order.

    Returns:
        Columns `prompt` and `completion`, both text or both lists of messages, or `input_ids` and
        what `TaskSource.input_ids` says, and `task`. None where `part` is "eval" and no source has
        anything to evaluate on.

    Raises:
        FileNotFoundError: a file isn't there.
        ValueError: a name, column or value is wrong, or nothing is left.
    """
    if (tasks is None) == (dataset is None):
        raise ValueError("give either `tasks` or `dataset`: the data to train on.")
    named = {"all": dataset} if tasks is None else tasks
    if tasks is not None:
        _check_tasks(only_tasks, list(tasks))
    sources = {
        task: source if isinstance(source, TaskSource) else TaskSource.parse(task, source)
        for task, source in named.items()
        if tasks is None or only_tasks is None or task in only_tasks
    }
    parts = {task: load_task(task, source, part, seed) for task, source in sources.items()}
    loaded = {task: rows for task, rows in parts.items() if rows is not None}
    if not loaded:
        if part == "eval":
            return None
        raise ValueError("`tasks` is empty: name at least one task.")
    if part == "train":
        loaded = _apply_weights(loaded, {task: sources[task].weight for task in loaded}, seed)
    mixture = _concatenate(loaded).shuffle(seed=seed)
    if tasks is None and only_tasks is not None:
        _check_tasks(only_tasks, sorted(set(mixture["task"])))
        mixture = mixture.filter(lambda task: task in only_tasks, input_columns="task")
    return mixture


def load_task(task: str, source: TaskSource, part: Part = "train", seed: int = 0) -> Dataset | None:
    """One task's examples, in the columns of `load_mixture`; None without an evaluation part."""
    if part == "eval" and source.eval_path is None and source.eval_split is None:
        return None
    if part == "train":
        rows = _read(task, source.path, source.name, source.split)
    else:
        default = "train" if source.eval_path is not None else source.split
        rows = _read(
            task, source.eval_path or source.path, source.name, source.eval_split or default
        )
    if len(rows) == 0:
        raise ValueError(f"task {task!r}: {source.path!r} has no examples.")
    if source.max_examples is not None and len(rows) > source.max_examples:
        rows = rows.shuffle(seed=seed).select(range(source.max_examples))
    if source.input_ids is not None:
        return rows.map(
            token_row_converter(task, source.path, source.input_ids, rows.column_names),
            with_indices=True,
            remove_columns=rows.column_names,
            desc=f"Reading {task}",
        )
    return rows.map(
        _row_converter(task, source, rows.column_names),
        with_indices=True,
        remove_columns=rows.column_names,
        # else a column of numbers would stay one, though its values have become text
        features=None if _has_messages(source, rows[0]) else TEXT_ROWS,
        desc=f"Reading {task}",
    )


def _read(task: str, path: str, name: str | None, split: str) -> Dataset:
    local = Path(path).expanduser()
    if local.suffix in BUILDERS and local.is_file():
        return _read_file(task, local)
    if local.is_file():
        raise ValueError(
            f"task {task!r}: can't read {path!r}; known formats: {', '.join(BUILDERS)}"
        )
    if local.is_dir() and (local / "dataset_dict.json").is_file():
        return _split(task, path, load_from_disk(str(local)), split)
    if local.is_dir() and (local / "dataset_info.json").is_file():
        return load_from_disk(str(local))
    if not local.is_dir() and (
        local.suffix in BUILDERS or local.is_absolute() or path.startswith((".", "~"))
    ):
        raise FileNotFoundError(f"task {task!r}: there is no file or folder {path!r}.")
    try:
        return load_dataset(str(local) if local.is_dir() else path, name, split=split)
    except ConnectionError as error:
        raise FileNotFoundError(
            f"task {task!r}: there is no file or folder {path!r}, and the Hub, which may have a "
            "dataset of that name, can't be reached."
        ) from error


def _read_file(task: str, path: Path) -> Dataset:
    try:
        return load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
    # StopIteration is what datasets 5.2 makes of an empty JSONL file
    except (ValueError, StopIteration, DatasetGenerationError) as error:
        reason = error.__cause__ or error or "no rows"
        raise ValueError(
            f"task {task!r}: {str(path)!r} is empty or not {path.suffix[1:]}: {reason}"
        ) from error


def _split(task: str, path: str, parts: DatasetDict, split: str) -> Dataset:
    if split not in parts:
        raise ValueError(
            f"task {task!r}: {path!r} has no split {split!r}; known splits: {', '.join(parts)}"
        )
    return parts[split]


def _has_messages(source: TaskSource, row: dict[str, Any]) -> bool:
    return source.messages is not None or isinstance(row.get(source.prompt), list)


def _row_converter(
    task: str, source: TaskSource, columns: list[str]
) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    wanted = [source.messages] if source.messages else [source.prompt, source.completion]
    for column in wanted:
        if column not in columns:
            raise ValueError(
                f"task {task!r}: {source.path!r} has no column {column!r}; its columns: "
                f"{', '.join(columns)}"
            )
    has_task = "task" in columns and "task" not in wanted

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        values = [row[column] for column in wanted]
        for column, value in zip(wanted, values, strict=True):
            if value is None or value == []:
                raise ValueError(f"task {task!r}: row {index} has no {column!r}.")
        if source.messages:
            if len(values[0]) < 2:
                raise ValueError(
                    f"task {task!r}: row {index} has a conversation of one message; the last is "
                    "learnt, so it needs a message before it."
                )
            values = [values[0][:-1], values[0][-1:]]
        prompt, completion = (v if isinstance(v, list) else str(v) for v in values)
        if isinstance(prompt, list) != isinstance(completion, list):
            raise ValueError(
                f"task {task!r}: row {index} has one of prompt and completion as text, the other "
                "as messages."
            )
        return {
            "prompt": prompt,
            "completion": completion,
            "task": str(row["task"]) if has_task else task,
        }

    return convert


def _apply_weights(
    parts: dict[str, Dataset], weights: dict[str, float | None], seed: int
) -> dict[str, Dataset]:
    given = {task: weight for task, weight in weights.items() if weight is not None}
    if not given:
        return parts
    if len(given) < len(parts):
        without = next(task for task in parts if task not in given)
        raise ValueError(f"task {without!r} has no weight, while others have; give all or none.")
    total = sum(given.values())
    shares = {task: weight / total for task, weight in given.items()}
    size = min(len(rows) / shares[task] for task, rows in parts.items())
    return {
        task: rows.shuffle(seed=seed).select(range(max(1, round(shares[task] * size))))
        for task, rows in parts.items()
    }


def _concatenate(parts: dict[str, Dataset]) -> Dataset:
    kinds = {task: _kind_of(rows) for task, rows in parts.items()}
    (first, kind), *_ = kinds.items()
    for task, other in kinds.items():
        if other != kind:
            raise ValueError(
                f"task {first!r} has {kind} and task {task!r} has {other}; a mixture needs one "
                "kind."
            )
    return concatenate_datasets(list(parts.values()))


def _kind_of(rows: Dataset) -> str:
    if is_tokenised(rows):
        return f"tokens ({', '.join(sorted(set(rows.column_names) - {'task'}))})"
    return "text" if isinstance(rows[0]["prompt"], str) else "messages"


def _check_tasks(wanted: list[str] | None, known: list[str]) -> None:
    for task in wanted or []:
        if task not in known:
            raise ValueError(f"unknown task {task!r}; known tasks: {', '.join(known)}")


def apply_format(
    dataset: Dataset, format: str, chat_template: str | None, system_prompt: str | None = None
) -> Dataset:
    """Turn text into messages where the format asks for a chat; messages and tokens stay.

    Raises:
        ValueError: the format isn't known, or doesn't go with the data or the tokenizer.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known formats: {', '.join(FORMATS)}")
    if is_tokenised(dataset):
        if format != "auto" or system_prompt is not None:
            field = f"format={format!r}" if format != "auto" else "system_prompt"
            raise ValueError(f"{field} needs text, but the data is tokenised.")
        return dataset
    is_text = isinstance(dataset[0]["prompt"], str)
    chat = format == "chat" or (format == "auto" and chat_template is not None) or not is_text
    if chat and chat_template is None:
        raise ValueError("the data needs the chat format, but the tokenizer has no chat template.")
    if not is_text and format == "plain":
        raise ValueError("format='plain' needs text, but the data has messages.")
    if not chat:
        if system_prompt is not None:
            raise ValueError(
                "system_prompt needs the chat format; put it into the prompts instead."
            )
        return dataset
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        if not is_text:
            return {"prompt": system + row["prompt"], "completion": row["completion"]}
        return {
            "prompt": [*system, {"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }

    return dataset.map(convert, desc="Formatting")
