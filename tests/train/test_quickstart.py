import json
import re

import pytest
from safetensors.torch import load_file

from arguments import parse_arguments
from quickstart import (
    QuickstartArguments,
    check_no_overlap,
    run,
    write_examples,
)

# TRL 1.16 sets by default what transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TASKS = {"chain_sum": SUMS, "letter_counting": {"min_words": 2, "max_words": 3}}


def test_the_splits_have_no_prompt_in_common(tmp_path):
    options = QuickstartArguments(TASKS, train_examples=60, held_out_examples=20)
    paths = write_examples(options, seed=0, folder=tmp_path)
    splits = {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name, path in paths.items()
    }
    prompts = {name: {row["prompt"] for row in rows} for name, rows in splits.items()}
    assert {name: len(rows) for name, rows in splits.items()} == {"held_out": 40, "train": 120}
    assert {name: len(found) for name, found in prompts.items()} == {"held_out": 40, "train": 120}
    assert prompts["held_out"].isdisjoint(prompts["train"])
    for row in splits["train"]:
        assert row["prompt"].endswith("\nAnswer:")
        assert re.fullmatch(r" \S.*", row["completion"])
        assert row["task"] in TASKS


def test_an_overlap_is_refused():
    rows = [{"prompt": "1 + 1"}, {"prompt": "1 + 2"}]
    check_no_overlap(rows, [{"prompt": "2 + 1"}])
    with pytest.raises(ValueError, match="1 held-out prompts are also trained on: '1 \\+ 2'"):
        check_no_overlap(rows, [{"prompt": "1 + 2"}])


@pytest.fixture
def command_line(model_folder, tmp_path):
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text(
        f"""
model_name_or_path: {model_folder}
dtype: float32
use_cpu: true
reasoning_tasks: {json.dumps(TASKS)}
train_examples: 20
held_out_examples: 4
reload_examples: 4
format: plain
adapter: {{num_experts: 4, r: 2, losses: {{load_balancing: 0.01}}}}
routing_report: false
output_dir: {tmp_path / "outputs"}
max_steps: 2
per_device_train_batch_size: 4
train_sampling_strategy: batch_rebalance
gradient_checkpointing: false
learning_rate: 0.01
save_strategy: "no"
disable_tqdm: true
"""
    )
    return ["--config", str(yaml)]


def test_the_whole_way_on_a_tiny_model(command_line, tmp_path, capsys):
    arguments, (options,) = parse_arguments(command_line, [QuickstartArguments])
    scores = run(arguments, options)
    output = tmp_path / "outputs"
    assert json.loads((output / "evaluation.json").read_text()) == scores
    assert set(scores) == {"base", "tuned"}
    for columns in scores.values():
        assert set(columns) == {"mean", *TASKS}
        assert all(0 <= value <= 1 for value in columns.values())
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    assert any(w.abs().max() > 0 for name, w in weights.items() if name.endswith(".B"))
    facts = json.loads((output / "run.json").read_text())
    assert (facts["steps"], facts["dtype"]) == (2, "float32")
    printed = capsys.readouterr().out
    assert "The reloaded adapter gives the same 4 answers." in printed
    assert "letter_counting" in printed


def test_a_reload_that_answers_otherwise_is_an_error(command_line, monkeypatch):
    arguments, (options,) = parse_arguments(command_line, [QuickstartArguments])
    monkeypatch.setattr("quickstart.answers_of_new_process", lambda *_: ["other"] * 4)
    with pytest.raises(RuntimeError, match="the reloaded adapter answers"):
        run(arguments, options)
