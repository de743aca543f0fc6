"""`molora compose`: what it writes, and what it says instead."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import molora
from molora.cli import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model) -> dict[str, str]:
    """A base model with its tokenizer, two LoRA adapters that name it, and examples."""
    root = tmp_path_factory.mktemp("compose")
    tiny_model("llama").save_pretrained(root / "base")
    words = {word: i for i, word in enumerate(["<pad>", *(f"w{i}" for i in range(63))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(
        root / "base"
    )
    for rank, name in ((2, "one"), (4, "two")):
        config = LoraConfig(
            r=rank, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        get_peft_model(base, config).save_pretrained(root / name)
    rows = [{"text": "w3 w4 w5 w3 w4 w5"}, {"prompt": "w3 w4", "completion": " w5 w3"}]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {path.stem: str(path) for path in root.iterdir()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 20)[None]).logits


def test_what_it_writes_is_what_compose_makes(folders, tmp_path: Path, capsys):
    adapters = [folders["one"], folders["two"]]
    options = ["--router", "arrow", "--top-k", "2", "--temperature", "0.5"]
    assert main(["compose", *adapters, *options, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert loaded.peft_config["default"].base_model_name_or_path == folders["base"]
    again = AutoModelForCausalLM.from_pretrained(folders["base"])
    expected = molora.compose(again, adapters, top_k=2, temperature=0.5)
    assert torch.equal(logits(loaded), logits(expected))


def test_weights_are_fitted_to_data(folders, tmp_path: Path, capsys):
    arguments = ["compose", folders["one"], folders["two"], "--router", "static"]
    arguments += ["--data", folders["data"], "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    weights = config["gate_options"]["weights"]
    assert said.startswith(f"weights: {weights[0]:.4f}, {weights[1]:.4f}\n")
    assert weights != [0.5, 0.5]


def test_a_dry_run_writes_nothing(folders, capsys):
    assert main(["compose", folders["one"], folders["two"], "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"expert 1: {folders['two']}, 2 of 2 sites, ranks 4"
    assert lines[2] == "router arrow, gate top_k, 2 of 2; total rank of a site: 6"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --output"),
        (["--output", "base"], "isn't empty; give --overwrite"),
        (["--data", "data", "--dry-run"], "--data fits the weights of --router static"),
        (["--weights", "1", "1", "--dry-run"], "weights are for router='static'"),
    ],
)
def test_what_is_refused(folders, capsys, options, message):
    options = [folders.get(option, option) for option in options]
    assert main(["compose", folders["one"], folders["two"], *options]) == 2
    assert message in capsys.readouterr().err
