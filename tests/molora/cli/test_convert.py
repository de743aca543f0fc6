"""`molora convert`."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from molora.cli import main


@pytest.fixture
def checkpoint(tiny_model, tmp_path) -> Path:
    """A MoLA checkpoint of moe-peft's, of a tiny Llama that it doesn't name."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {"peft_type": "MOLA", "bias": "none", "r": 2, "lora_alpha": 4, "num_experts": 3}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(2):
        root = f"mola.layers.{layer}.self_attn.q_proj"
        tensors[f"{root}.moe_gate.weight"] = torch.randn(3, 32)
        for e in range(3):
            tensors[f"{root}.experts.{e}.lora_A.weight"] = torch.randn(2, 32)
            tensors[f"{root}.experts.{e}.lora_B.weight"] = torch.randn(32, 2)
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


def test_it_writes_an_adapter_that_peft_loads(checkpoint, tiny_model, tmp_path, capsys):
    arguments = ["convert", str(checkpoint), "--model", str(tmp_path / "base")]
    assert main([*arguments, "--dry-run"]) == 0
    assert "becomes mola" in capsys.readouterr().out
    assert not (tmp_path / "adapter").exists()
    assert main([*arguments, "--output", str(tmp_path / "adapter")]) == 0
    model = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "adapter"))
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "OUT"], "names no base model"),
        (["--model", "BASE"], "give --output"),
        (["--model", "BASE", "--dry-run", "--adapters", "x"], "adapters= is for X-LoRA"),
        (["--model", "./nowhere", "--dry-run"], "there is no model at ./nowhere"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, checkpoint, tmp_path, capsys):
    places = {"BASE": str(tmp_path / "base"), "OUT": str(tmp_path / "adapter")}
    given = [places.get(argument, argument) for argument in arguments]
    assert main(["convert", str(checkpoint), *given]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
