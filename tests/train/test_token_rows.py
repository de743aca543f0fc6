"""Tokenised data with a modality for each token, from a YAML to the layers."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from arguments import parse_arguments
from data import TaskSource, apply_format, load_mixture
from molora import MoloraConfig
from sft import build_trainer, main
from token_rows import columns_for_routing, cut

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    # TRL 1.16 sets by default what transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),
    # torch's loader, which has no accelerator to pin memory for
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]
IMAGE = 50  # ids from here on stand for parts of an image


def token_rows(count: int = 8) -> list[dict[str, Any]]:
    """Rows of 4 to 7 tokens, an image first; what is said of it is learnt."""
    found = []
    for n in range(count):
        ids = [5, IMAGE + n, IMAGE + 2 * n, 9, 30, 20 + n][: 4 + n % 3] + [2]
        modality = [int(token >= IMAGE) for token in ids]
        labels = [-100] * 3 + ids[3:]
        found.append({"input_ids": ids, "labels": labels, "modality_ids": modality})
    return found


@pytest.fixture
def command_line(tmp_path, model_folder, write_rows):
    """`command_line(method, **fields)`: the method's own YAML, on a tiny model and this data."""
    rows = write_rows("rows.jsonl", token_rows())
    held_out = write_rows("held_out.jsonl", token_rows(4))

    def build(method: str, **fields: Any) -> list[str]:
        said = yaml.safe_load((ROOT / "configs" / "sft" / f"{method}.yaml").read_text())
        said["dataset"] = {**said["dataset"], "path": rows, "eval_path": held_out}
        said |= {
            "model_name_or_path": str(model_folder), "output_dir": str(tmp_path / "run"),
            "use_cpu": True, "dtype": "float32", "per_device_train_batch_size": 4,
            "disable_tqdm": True, "logging_steps": 1, "routing_report": False, **fields,
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(said))
        return ["--config", str(path)]

    return build


@pytest.mark.parametrize("method", ["moiie", "smar"])
def test_it_trains_from_its_yaml(method: str, command_line, tmp_path: Path, tokenizer):
    main(command_line(method, learning_rate=0.05, num_train_epochs=6))
    state = json.loads((tmp_path / "run" / "checkpoint-12" / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert len(losses) == 5  # the checkpoint is older than the last one
    assert losses[-1] < 0.92 * math.log(len(tokenizer))  # which the random model starts from
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in adapter.items() if name.endswith(".B"))


def test_every_token_brings_its_modality(command_line):
    arguments, _ = parse_arguments(command_line("moiie", max_length=5))
    trainer = build_trainer(arguments)
    seen = 0
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        for batch in loader:
            ids = batch["input_ids"]
            assert batch["modality_ids"].tolist() == (ids >= IMAGE).int().tolist()
            assert ids.shape[1] == 5
            assert (batch["labels"][:, :3] == -100).all()
            assert (batch["labels"][:, 3:5] == ids[:, 3:5]).all()
            seen += len(ids)
    assert seen == 12


def test_text_is_refused_where_modalities_are_read(command_line, write_rows):
    text = {"path": write_rows("text.jsonl", [{"prompt": "a", "completion": "b"}] * 4)}
    with pytest.raises(ValueError, match=r"'modality_groups'.*reads modality_ids.*input_ids: COL"):
        build_trainer(parse_arguments(command_line("moiie", dataset=text))[0])


def training(**fields: Any) -> SimpleNamespace:
    defaults = {"packing": False, "eval_packing": None, "max_length": 3}
    return SimpleNamespace(**{**defaults, "truncation_mode": "keep_start", **fields})


@pytest.mark.parametrize("field", ["packing", "eval_packing"])
def test_packing_is_refused_where_modalities_are_read(field: str):
    rows = Dataset.from_list(token_rows())
    smar = MoloraConfig.from_method("smar")
    with pytest.raises(ValueError, match=f"{field}=True .*'modality_bias', the loss 'modality_kl'"):
        columns_for_routing(smar, rows, training(**{field: True}))
    assert columns_for_routing(smar, rows, training()) == ["modality_ids"]
    mola = MoloraConfig.from_method("mola")
    assert columns_for_routing(mola, rows, training(**{field: True})) == []


def test_rows_are_cut_as_the_trainer_cuts_them():
    rows = Dataset.from_dict(
        {"input_ids": [[5, 6, 7, 8], [9]], "modality_ids": [[0, 1, 1, 0], [1]]}
    )
    assert cut(rows, training())["modality_ids"][:] == [[0, 1, 1], [1]]
    assert cut(rows, training(truncation_mode="keep_end"))["input_ids"][:] == [[6, 7, 8], [9]]
    assert cut(rows, training(max_length=None)) is rows


def test_what_is_kept_of_the_data(write_rows):
    rows = [{"ids": [4, 5], "modality_ids": [0, 1], "task": "t", "more": 1}]
    source = {"path": write_rows("rows.jsonl", rows), "input_ids": "ids"}
    (row,) = load_mixture(None, source)
    assert row == {"input_ids": [4, 5], "modality_ids": [0, 1], "task": "t"}
    rows = load_mixture({"a": source})
    assert apply_format(rows, "auto", "template") is rows
    for format, prompt in (("chat", None), ("auto", "Be brief.")):
        with pytest.raises(ValueError, match="needs text, but the data is tokenised"):
            apply_format(rows, format, "template", system_prompt=prompt)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [4, 5], "modality_ids": [0]}, "row 0 has 1 values in 'modality_ids' for 2"),
        ({"input_ids": [4], "labels": None}, "row 0 has None values in 'labels' for 1 tokens"),
        ({"input_ids": []}, "row 0 has no token ids in 'input_ids', but []"),
        ({"input_ids": "text"}, "row 0 has no token ids in 'input_ids', but 'text'"),
        ({"ids": [1]}, "has no column 'input_ids'; its columns: ids"),
    ],
)
def test_rows_that_are_wrong(row: dict[str, Any], message: str, write_rows):
    source = {"path": write_rows("rows.jsonl", [row]), "input_ids": "input_ids"}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_mixture({"t": source})


def test_mixtures_of_unlike_rows(write_rows):
    whole = write_rows("whole.jsonl", token_rows(2))
    bare = write_rows("bare.jsonl", [{"input_ids": [4]}])
    text = write_rows("text.jsonl", [{"prompt": "a", "completion": "b"}])
    tokens = {"path": whole, "input_ids": "input_ids"}
    with pytest.raises(ValueError, match=r"'a' has tokens \(.*modality_ids\) and task 'b' has tok"):
        load_mixture({"a": tokens, "b": {"path": bare, "input_ids": "input_ids"}})
    with pytest.raises(ValueError, match="'a' has text and task 'b' has tokens"):
        load_mixture({"a": text, "b": tokens})
    with pytest.raises(ValueError, match="give messages or input_ids, not both"):
        TaskSource.parse("t", {**tokens, "messages": "turns"})
