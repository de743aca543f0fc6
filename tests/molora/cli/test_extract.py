"""`molora extract`."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from molora.cli import main


@pytest.fixture
def models(tiny_model, tmp_path) -> list[str]:
    """Folders of a tiny Llama and of its fine-tune, which differ in one module by a rank of 2."""
    tuned = tiny_model("llama")
    weight = tuned.model.layers[0].mlp.up_proj.weight
    weight.data += 0.1 * torch.randn(48, 2) @ torch.randn(2, 32)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    return [str(tmp_path / "base"), str(tmp_path / "tuned")]


def test_it_writes_an_adapter_that_peft_loads(
    models, tiny_model, tiny_batch, logits_of, tmp_path, capsys
):
    assert main(["extract", *models, "--rank", '{"up_proj": 2, ".*": 1}', "--dry-run"]) == 0
    assert "14 modules, ranks 1 to 2 at most" in capsys.readouterr().out
    output = tmp_path / "lora"
    assert main(["extract", *models, "--rank", "2", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "up_proj" in said and "Targeted but equal" in said
    model = PeftModel.from_pretrained(tiny_model("llama"), str(output)).eval()
    tuned = type(tiny_model("llama")).from_pretrained(models[1])
    batch = tiny_batch("llama")
    torch.testing.assert_close(logits_of(model, batch), logits_of(tuned, batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give rank, max_error, or both"),
        (["--rank", "many"], "--rank many is neither a number nor JSON"),
        (["--rank", "2", "--targets", "q_proj"], "also changed model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, models, tmp_path: Path, capsys):
    assert main(["extract", *models, "--output", str(tmp_path / "lora"), *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert main(["extract", *models, "--rank", "2"]) == 2
    assert "give --output" in capsys.readouterr().err
