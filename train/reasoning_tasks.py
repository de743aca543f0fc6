"""Examples of reasoning_gym's procedural tasks: made on the spot, no download."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import reasoning_gym

ATTEMPTS_PER_EXAMPLE = 20  # a small task repeats itself; one that can't fill the request must end


def make_examples(
    task: str,
    settings: Mapping[str, Any],
    count: int,
    seed: int,
    exclude: Collection[str] = (),
) -> list[dict[str, str]]:
    """`count` examples with different prompts.

    Args:
        task: name of a reasoning_gym dataset.
        settings: its settings, such as {"max_terms": 3}.
        seed: another seed gives other examples, and possibly some of the same.
        exclude: prompts that must not occur, such as those of the other split.

    Returns:
        Rows with `prompt`, `completion` and `task`.

    Raises:
        ValueError: the task or a setting isn't known, or it has too few different examples.
    """
    size = count * ATTEMPTS_PER_EXAMPLE
    rows: list[dict[str, str]] = []
    seen = set(exclude)
    for prompt, answer in _entries(task, settings, size, seed):
        if prompt in seen:
            continue
        seen.add(prompt)
        rows.append({"prompt": prompt, "completion": answer, "task": task})
        if len(rows) == count:
            return rows
    raise ValueError(
        f"task {task!r} gave {len(rows)} different examples of {size}, {count} are wanted; widen "
        f"its settings {dict(settings)}."
    )


def _entries(
    task: str, settings: Mapping[str, Any], size: int, seed: int
) -> Iterator[tuple[str, str]]:
    try:
        entries = reasoning_gym.create_dataset(task, size=size, seed=seed, **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"task {task!r} of reasoning_gym: {error}") from error
    for index in range(size):
        entry = entries[index]
        yield entry["question"].strip(), str(entry["answer"]).strip()
