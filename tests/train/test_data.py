import json
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from data import TaskSource, apply_format, load_mixture


def numbered(task: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{task} {i}", "completion": str(i)} for i in range(count)]


def counts(mixture: Dataset) -> dict[str, int]:
    return dict(Counter(mixture["task"]))


def test_tasks_without_weights_are_used_whole(write_rows):
    sizes = {"a": 3, "b": 5}
    tasks = {name: write_rows(f"{name}.jsonl", numbered(name, n)) for name, n in sizes.items()}
    mixture = load_mixture(tasks)
    assert counts(mixture) == sizes
    assert set(mixture.column_names) == {"prompt", "completion", "task"}
    by_prompt = dict(zip(mixture["prompt"], mixture["completion"], strict=True))
    assert by_prompt["b 4"] == "4"


def test_weights_give_the_shares_and_repeat_no_example(write_rows):
    tasks = {
        "a": {"path": write_rows("a.jsonl", numbered("a", 30)), "weight": 3},
        "b": {"path": write_rows("b.jsonl", numbered("b", 6)), "weight": 1},
    }
    mixture = load_mixture(tasks)
    assert counts(mixture) == {"a": 18, "b": 6}  # b limits it: 6 examples are a quarter
    assert len(set(mixture["prompt"])) == 24


def test_the_seed_decides_subset_and_order(write_rows):
    tasks = {"a": {"path": write_rows("a.jsonl", numbered("a", 40)), "max_examples": 10}}
    first, again, other = (load_mixture(tasks, seed=seed)["prompt"][:] for seed in (1, 1, 2))
    assert len(first) == 10
    assert first == again
    assert set(first) != set(other)


def test_a_task_column_names_the_tasks(write_rows):
    rows = [
        {**row, "task": "even" if i % 2 == 0 else "odd"} for i, row in enumerate(numbered("x", 7))
    ]
    path = write_rows("both.jsonl", rows)
    assert counts(load_mixture(None, path)) == {"even": 4, "odd": 3}
    assert counts(load_mixture(None, path, only_tasks=["odd"])) == {"odd": 3}
    with pytest.raises(ValueError, match="unknown task 'prime'; known tasks: even, odd"):
        load_mixture(None, path, only_tasks=["prime"])


def test_only_tasks_of_a_mixture(write_rows):
    tasks = {name: write_rows(f"{name}.jsonl", numbered(name, 4)) for name in ("a", "b")}
    assert counts(load_mixture(tasks, only_tasks=["b"])) == {"b": 4}
    with pytest.raises(ValueError, match="unknown task 'c'; known tasks: a, b"):
        load_mixture(tasks, only_tasks=["c"])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".csv"])
def test_local_files(suffix, tmp_path):
    rows = [{"question": "q1", "answer": "a1"}, {"question": "q2", "answer": "a2"}]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).to_csv(path)
    source = {"path": str(path), "prompt": "question", "completion": "answer"}
    mixture = load_mixture({"t": source})
    assert sorted(zip(mixture["prompt"], mixture["completion"], strict=True)) == [
        ("q1", "a1"),
        ("q2", "a2"),
    ]


def test_saved_dataset_and_its_splits(tmp_path):
    DatasetDict(
        train=Dataset.from_list(numbered("t", 3)), test=Dataset.from_list(numbered("e", 2))
    ).save_to_disk(tmp_path)
    tasks = {"a": {"path": str(tmp_path), "eval_split": "test"}}
    assert len(load_mixture(tasks)) == 3
    assert sorted(load_mixture(tasks, part="eval")["prompt"]) == ["e 0", "e 1"]
    with pytest.raises(ValueError, match="no split 'dev'; known splits: train, test"):
        load_mixture({"a": {"path": str(tmp_path), "split": "dev"}})


def test_the_evaluation_part_is_its_own_file(write_rows):
    train, held_out = (write_rows(f"{n}.jsonl", numbered(n, 3)) for n in ("train", "held"))
    tasks = {"a": {"path": train, "eval_path": held_out}, "b": train}
    assert counts(load_mixture(tasks, part="eval")) == {"a": 3}
    assert load_mixture({"b": train}, part="eval") is None


def test_conversations_learn_their_last_message(write_rows):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "see you"},
    ]
    path = write_rows("chat.jsonl", [{"turns": turns}])
    (row,) = load_mixture(None, {"path": path, "messages": "turns"})
    assert row["prompt"] == turns[:3]
    assert row["completion"] == turns[3:]


def test_formats(write_rows):
    rows = load_mixture(None, write_rows("a.jsonl", [{"prompt": "2+2", "completion": 4}]))
    assert apply_format(rows, "plain", "template")[0]["completion"] == "4"
    assert apply_format(rows, "auto", None)[0]["prompt"] == "2+2"
    for name in ("auto", "chat"):
        row = apply_format(rows, name, "template", system_prompt="Be brief.")[0]
        assert row["prompt"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2+2"},
        ]
        assert row["completion"] == [{"role": "assistant", "content": "4"}]


def test_messages_stay_messages(write_rows):
    row = {
        "prompt": [{"role": "user", "content": "2+2"}],
        "completion": [{"role": "assistant", "content": "4"}],
    }
    rows = load_mixture(None, write_rows("a.jsonl", [row]))
    assert apply_format(rows, "auto", "template")[0]["prompt"] == row["prompt"]
    with pytest.raises(ValueError, match="format='plain' needs text"):
        apply_format(rows, "plain", "template")
    with pytest.raises(ValueError, match="no chat template"):
        apply_format(rows, "auto", None)


def test_wrong_formats(write_rows):
    rows = load_mixture(None, write_rows("a.jsonl", numbered("a", 1)))
    with pytest.raises(ValueError, match="unknown format 'alpaca'; known formats: auto, chat"):
        apply_format(rows, "alpaca", None)
    with pytest.raises(ValueError, match="no chat template"):
        apply_format(rows, "chat", None)
    with pytest.raises(ValueError, match="system_prompt needs the chat format"):
        apply_format(rows, "plain", "template", system_prompt="Be brief.")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "missing.jsonl",
            FileNotFoundError,
            "task 't': there is no file .*'missing.jsonl'",
        ),
        ("/no/such/folder", FileNotFoundError, "there is no file or folder '/no/such/folder'"),
        (
            {"path": "x.jsonl", "colour": 1},
            ValueError,
            "unknown key 'colour'; known keys: path",
        ),
        ({"weight": 1}, ValueError, "neither a path nor"),
        ({"path": "x.jsonl", "weight": 0}, ValueError, "weight=0 must be above 0"),
        ({"path": "x.jsonl", "max_examples": 0}, ValueError, "max_examples=0 must be above 0"),
    ],
)
def test_wrong_sources(source, error, message):
    with pytest.raises(error, match=message):
        load_mixture({"t": source})


def test_wrong_files(tmp_path, write_rows):
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(ValueError, match=r"known formats: \.json, \.jsonl, \.parquet, \.csv"):
        load_mixture({"t": str(text)})
    empty = tmp_path / "empty.parquet"
    Dataset.from_dict({"prompt": [], "completion": []}).to_parquet(empty)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "header.csv").write_text("prompt,completion\n")
    (tmp_path / "broken.json").write_text("[{")
    for name in ("empty.parquet", "empty.jsonl", "header.csv", "broken.json"):
        with pytest.raises(ValueError, match=f"task 't': .*{name}' is empty or not"):
            load_mixture({"t": str(tmp_path / name)})
    other = write_rows("other.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match="no column 'prompt'; its columns: question, answer"):
        load_mixture({"t": other})
    holes = write_rows("holes.jsonl", [*numbered("a", 2), {"prompt": "p", "completion": None}])
    with pytest.raises(ValueError, match="task 't': row 2 has no 'completion'"):
        load_mixture({"t": holes})
    message = [{"role": "user", "content": "hi"}]
    mixed = write_rows("mixed.jsonl", [{"prompt": message, "completion": "hello"}])
    with pytest.raises(ValueError, match="row 0 has one of prompt and completion as text"):
        load_mixture({"t": mixed})
    short = write_rows("short.jsonl", [{"turns": message}])
    with pytest.raises(ValueError, match="row 0 has a conversation of one message"):
        load_mixture({"t": {"path": short, "messages": "turns"}})


def test_wrong_mixtures(write_rows):
    path = write_rows("a.jsonl", numbered("a", 2))
    with pytest.raises(ValueError, match="task 'b' has no weight, while others have"):
        load_mixture({"a": {"path": path, "weight": 1}, "b": path})
    for both in ({}, {"tasks": {"a": path}, "dataset": path}):
        with pytest.raises(ValueError, match="give either `tasks` or `dataset`"):
            load_mixture(both.get("tasks"), both.get("dataset"))
    with pytest.raises(ValueError, match="`tasks` is empty"):
        load_mixture({})
    message = [{"role": "user", "content": "hi"}]
    chat = write_rows("c.jsonl", [{"prompt": message, "completion": message}])
    with pytest.raises(ValueError, match="task 'a' has text and task 'c' has messages"):
        load_mixture({"a": path, "c": chat})


def test_a_source_can_be_made_in_python(write_rows):
    source = TaskSource(path=write_rows("a.jsonl", numbered("a", 2)))
    assert len(load_mixture({"a": source})) == 2


def test_datasets_of_the_hub(monkeypatch):
    asked = []

    def hub(path, name, split):
        asked.append((path, name, split))
        return Dataset.from_list(numbered("t", 2 if split == "train" else 0))

    monkeypatch.setattr("data.load_dataset", hub)
    tasks = {"t": {"path": "org/name", "name": "main", "eval_split": "test"}}
    assert len(load_mixture(tasks)) == 2
    with pytest.raises(ValueError, match="task 't': 'org/name' has no examples"):
        load_mixture(tasks, part="eval")
    assert asked == [("org/name", "main", "train"), ("org/name", "main", "test")]


def test_the_hub_out_of_reach(monkeypatch):
    def hub(path, name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr("data.load_dataset", hub)
    with pytest.raises(FileNotFoundError, match="'org/name', and the Hub, .* can't be reached"):
        load_mixture({"t": "org/name"})
