"""Task ids from a YAML to the layers, and what stands in their way."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from arguments import parse_arguments
from molora import MoloraConfig
from sft import build_trainer, main
from task_ids import add_task_ids, ids_of_run, keep_task_ids, number_tasks, readers

pytestmark = [
    # TRL 1.16 sets by default what transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),
    # torch's loader, which has no accelerator to pin memory for
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]
LOSS = {"localized_balancing": {"coefficient": 0.1, "num_groups": 2}}
GROUPED = MoloraConfig.from_method("loramoe", losses=LOSS)


@pytest.fixture
def command_line(tmp_path, model_folder, write_rows):
    """`command_line(**flags)`: a LoRAMoE run on two tasks that the first letter tells apart."""
    upper = [{"prompt": f"UPPER {n}", "completion": " A" * n} for n in range(1, 5)]
    lower = [{"prompt": f"lower {n}", "completion": " a" * n} for n in range(1, 5)]
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        f"""
model_name_or_path: {model_folder}
tasks:
  upper: {write_rows("upper.jsonl", upper)}
  lower: {write_rows("lower.jsonl", lower)}
task_ids: {{upper: 1, lower: 0}}
format: plain
method: loramoe
adapter:
  num_experts: 4
  losses: {{localized_balancing: {{coefficient: 0.1, num_groups: 2}}}}
routing_report: false
use_cpu: true
dtype: float32
per_device_train_batch_size: 4
max_steps: 2
logging_steps: 1
disable_tqdm: true
output_dir: {tmp_path / "run"}
"""
    )

    def build(**flags) -> list[str]:
        return ["--config", str(yaml)] + [
            part for key, value in flags.items() for part in (f"--{key}", str(value))
        ]

    return build


def test_every_example_brings_its_id(command_line, tokenizer):
    trainer = build_trainer(parse_arguments(command_line())[0])
    seen = []
    for batch in trainer.get_train_dataloader():
        letters = [tokenizer.decode(ids[:5]) for ids in batch["input_ids"]]
        assert batch["routing_task_ids"].tolist() == [int(text.isupper()) for text in letters]
        seen += letters
    assert sorted(seen) == ["UPPER"] * 4 + ["lower"] * 4


def test_localized_balancing_trains_from_a_yaml(command_line, tmp_path: Path):
    main(command_line(eval_strategy="no", save_steps=2))
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    losses = [entry["routing/localized_balancing"] for entry in state["log_history"][:2]]
    assert all(loss > 0 for loss in losses)
    assert json.loads((tmp_path / "run" / "task_ids.json").read_text()) == {"upper": 1, "lower": 0}
    yaml = tmp_path / "run.yaml"
    yaml.write_text(yaml.read_text().replace("{upper: 1, lower: 0}", "{upper: 0, lower: 1}"))
    with pytest.raises(ValueError, match="the run that is resumed knew its tasks by"):
        main(command_line(resume_from_checkpoint="latest", max_steps=3))


def test_packing_is_refused_where_the_task_is_read(command_line):
    arguments = parse_arguments(command_line(packing=True))[0]
    with pytest.raises(ValueError, match="packing=True .* the loss 'localized_balancing' asks for"):
        build_trainer(arguments)


def data(*names: str) -> Dataset:
    return Dataset.from_dict({"task": list(names)})


def training(packing: bool = False, eval_packing: bool | None = None) -> SimpleNamespace:
    return SimpleNamespace(packing=packing, eval_packing=eval_packing)


def test_who_reads_them():
    assert readers(GROUPED) == {"the loss 'localized_balancing'": 2}
    assert readers(MoloraConfig.from_method("mola")) == {}


def test_where_nobody_reads_them_they_are_numbered_on_demand_alone():
    mola = MoloraConfig.from_method("mola")
    assert ids_of_run(mola, data("a", "b"), training(packing=True), ["a", "b"], None) is None
    assert ids_of_run(mola, data("a"), training(), ["a"], {"a": 3}) == {"a": 3}
    with pytest.raises(ValueError, match="eval_packing=True .* task_ids asks for"):
        ids_of_run(mola, data("a"), training(eval_packing=True), ["a"], {"a": 3})


def test_more_tasks_than_groups():
    with pytest.raises(ValueError, match="knows 2 tasks, numbered from 0.*'c': 2"):
        ids_of_run(GROUPED, data("a", "b", "c"), training(), ["a", "b", "c"], None)
    shared = {"a": 0, "b": 1, "c": 0}
    assert ids_of_run(GROUPED, data("a", "b", "c"), training(), None, shared) == shared


def test_the_order_of_the_ids():
    assert number_tasks(["b", "a", "c"], ["c", "x", "b", "a"], None) == {"c": 0, "b": 1, "a": 2}
    assert number_tasks(["b", "a"], None, None) == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"a": 0}, "task_ids has no id for the task 'b'; give one for each of: a, b"),
        ({"a": 0, "b": -1}, "the id of 'b' is -1, not a whole number from 0"),
        ({"a": 0, "b": True}, "the id of 'b' is True"),
        ({"a": "x", "b": 1}, "the id of 'a' is 'x'"),
    ],
)
def test_ids_that_are_wrong(chosen, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        number_tasks(["a", "b"], None, chosen)


def test_a_task_to_evaluate_on_that_was_never_trained():
    with pytest.raises(ValueError, match="the task 'z' has no id; those with one: a, b"):
        add_task_ids(data("a", "z"), {"a": 0, "b": 1})
    assert add_task_ids(data("b", "a", "b"), {"a": 0, "b": 1})["task_ids"] == [1, 0, 1]


def test_one_process_writes_and_all_compare(tmp_path: Path):
    keep_task_ids({"a": 0}, tmp_path, resumed=False, writes=False)
    assert not list(tmp_path.iterdir())
    keep_task_ids({"a": 0}, tmp_path, resumed=True, writes=True)
    keep_task_ids({"a": 1}, tmp_path, resumed=False, writes=True)  # a new run in the old folder
    with pytest.raises(ValueError, match="give the former as task_ids"):
        keep_task_ids({"a": 0}, tmp_path, resumed=True, writes=False)
