import json

import pytest
from peft import PeftModel

from arguments import parse_arguments
from compare_methods import CompareArguments, Run, compare, table
from models import load_model

# TRL 1.16 sets by default what transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")


@pytest.fixture
def parse(model_folder, tmp_path, write_rows):
    rows = [
        {"prompt": f"{a} + {b} =", "completion": str(a + b), "task": "sums" if b < 2 else "more"}
        for a in range(4)
        for b in range(4)
    ]
    source = {"path": write_rows("train.jsonl", rows), "eval_path": write_rows("held.jsonl", rows)}

    def with_flags(*flags, dataset=source):
        yaml = tmp_path / "tiny.yaml"
        yaml.write_text(
            f"""
model_name_or_path: {model_folder}
dtype: float32
use_cpu: true
dataset: {json.dumps(dataset)}
format: plain
adapter: {{num_experts: 4, top_k: 2, r: 2}}
output_dir: {tmp_path / "outputs"}
max_steps: 1
per_device_train_batch_size: 4
gradient_checkpointing: false
save_strategy: "no"
disable_tqdm: true
"""
        )
        arguments, (options,) = parse_arguments(["--config", str(yaml), *flags], [CompareArguments])
        return arguments, options

    return with_flags


def test_every_method_trains_at_the_size_of_the_first(parse, tmp_path, model_folder, capsys):
    runs = compare(*parse("--methods", "own", "lora", "hydralora", "--seeds", "3", "4"))
    output = tmp_path / "outputs"
    assert [(run.method, run.seed) for run in runs] == [
        (method, seed) for seed in (3, 4) for method in ("own", "lora", "hydralora")
    ]
    own = runs[0].parameters
    assert runs[0].r == 2
    assert all(abs(run.parameters - own) < 0.15 * own for run in runs)
    assert set(runs[0].accuracy) == {"sums", "more", "mean"}
    recorded = json.loads((output / "comparison.json").read_text())
    assert [run["parameters"] for run in recorded] == [run.parameters for run in runs]
    for run in runs:
        model = PeftModel.from_pretrained(
            load_model(str(model_folder)), output / f"{run.method}-{run.seed}", is_trainable=True
        )
        assert model.get_nb_trainable_parameters()[0] == run.parameters
    assert "16 problems" in capsys.readouterr().out


def test_methods_may_keep_their_own_ranks(parse):
    _, options = parse("--equal_size", "False")
    assert options.methods == ["own", "lora"]
    runs = compare(*parse("--methods", "own", "lora", "--equal_size", "False"))
    assert [run.r for run in runs] == [2, 8]


def test_what_cannot_be_compared_is_refused_before_any_training(parse, monkeypatch):
    monkeypatch.setattr("compare_methods.train_once", lambda *_: pytest.fail("it trained"))
    with pytest.raises(ValueError, match="unknown method 'mole'"):
        compare(*parse("--methods", "lora", "mole"))
    with pytest.raises(ValueError, match="'poly' can't be compared: the router .* reads task_ids"):
        compare(*parse("--methods", "poly"))
    with pytest.raises(RuntimeError, match="'expert_choice' can't generate with a KV cache"):
        compare(*parse("--methods", "expert-choice"))
    with pytest.raises(ValueError, match="no part to evaluate on; set eval_split or eval_path"):
        arguments, options = parse()
        arguments.data.dataset = {"path": arguments.data.dataset["path"]}
        compare(arguments, options)


@pytest.mark.parametrize(("name", "values"), [("methods", ("own", "own")), ("seeds", ("1", "1"))])
def test_nothing_is_compared_with_itself(parse, name, values):
    with pytest.raises(ValueError, match=f"{name}=.* must name one or more, each once"):
        parse(f"--{name}", *values)


def test_the_table_has_means_over_the_seeds():
    runs = [
        Run("own", 0, 8, 1000, 1.0, {"sums": 0.5, "mean": 0.5}),
        Run("lora", 0, 32, 1100, 2.0, {"sums": 0.25, "mean": 0.25}),
        Run("own", 1, 8, 1000, 2.0, {"sums": 0.7, "mean": 0.7}),
    ]
    assert table(runs).splitlines() == [
        "| method | r | parameters | minutes | sums | mean |",
        "| --- | --- | --- | --- | --- | --- |",
        "| own | 8 | 1,000 | 1.5 | 60.0 | 60.0 ± 14.1 |",
        "| lora | 32 | 1,100 | 2.0 | 25.0 | 25.0 |",
    ]
