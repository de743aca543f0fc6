"""LoRA folders: exact where they say so, loadable without this library, whole or not there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import molora
from molora import MoloraConfig
from molora.layer import adapted_layers

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TARGETS = ["q_proj", "v_proj", "down_proj"]
EXACT: dict[str, dict[str, Any]] = {
    "nothing routed": {"num_experts": 0, "num_shared_experts": 2},
    "uniform": {"gate": "uniform", "router": "random", "num_experts": [2, 3]},
    "rsLoRA, own ranks": {
        "gate": "uniform", "router": "random", "r": {".*": [1, 2, 3]}, "num_experts": 3,
        "use_rslora": True, "num_shared_experts": 1,
    },
    "one A": {"experts": "shared_a", "gate": "uniform", "router": "random", "num_experts": 3},
    "goat": {"experts": "svd_segments", "gate": "uniform", "router": "random", "num_experts": 3},
    "some layers": {"num_experts": 0, "num_shared_experts": 1, "layers_to_transform": [1]},
}  # fmt: skip


@pytest.fixture
def build(tiny_model, randomize):
    def make(base: str = "llama", **fields: Any) -> Any:
        settings = {"r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **fields}
        model = get_peft_model(tiny_model(base), MoloraConfig(**settings))
        return randomize(model).eval()

    return make


@pytest.mark.parametrize("fields", EXACT.values(), ids=EXACT)
def test_plain_peft_computes_the_same(build, fields, tiny_model, tiny_batch, logits_of, tmp_path):
    model, batch = build(**fields), tiny_batch("llama")
    molora.export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "lora")
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(
        logits_of(loaded, batch), logits_of(model, batch), rtol=1e-4, atol=1e-4
    )
    sites = {f"base_model.model.{site}" for site in adapted_layers(model)}
    found = {name for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    assert found == sites
    assert "Exact: " in (tmp_path / "lora" / "README.md").read_text()


def test_a_routed_adapter_is_written_as_it_was_calibrated(
    build, tiny_model, tiny_batch, logits_of, tmp_path
):
    model, batch = build(num_experts=3), tiny_batch("llama")
    with pytest.raises(ValueError, match=r"routes its experts by token.*molora.calibrate"):
        molora.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    for method, rank in (("least_squares", None), ("full", None), ("low_rank", 3)):
        report = molora.calibrate(model, [batch] * 2, method, rank, progress=False)
        molora.export_lora(model, tmp_path / method)
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / method)
        assert loaded.peft_config["default"].r == (rank or 6)
        with molora.static_routing(model):
            expected = logits_of(model, batch)
        torch.testing.assert_close(logits_of(loaded, batch), expected, rtol=1e-3, atol=1e-3)
        card = ModelCard.load(tmp_path / method / "README.md")
        assert report.summary() in card.text and "An approximation of token routing" in card.text
        assert card.data.library_name == "peft" and card.data.tags == ["lora", "molora"]


def test_a_cut_is_the_best_of_its_rank(build, tmp_path):
    model = build(num_experts=0, num_shared_experts=2)
    molora.export_lora(model, tmp_path / "cut", rank=3)
    tensors = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    errors = []
    for site, layer in adapted_layers(model).items():
        A, B = (tensors[f"base_model.model.{site}.lora_{f}.weight"].double() for f in "AB")
        delta = layer.get_delta_weight("default").detach().double()
        singular = torch.linalg.svdvals(delta)
        assert A.shape[0] == B.shape[1] == 3
        torch.testing.assert_close(
            (delta - B @ A).norm(), singular[3:].norm(), rtol=1e-4, atol=1e-5
        )
        errors.append(float(singular[3:].norm() / singular.norm()))
    assert f"is {max(errors):.3g}." in (tmp_path / "cut" / "README.md").read_text()
    with pytest.raises(ValueError, match="rank=0 must be a whole number of at least 1"):
        molora.export_lora(model, tmp_path / "none", rank=0)


def test_the_engines_rules(build, tmp_path):
    model = build(gate="uniform", router="random", num_experts=[2, 3])
    molora.export_lora(model, tmp_path / "lora", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == 6
    assert sorted(config["target_modules"]) == sorted(TARGETS) and config["bias"] == "none"
    assert not config["use_rslora"] and not config["use_dora"] and config["modules_to_save"] is None
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(adapted_layers(model))
    for name, tensor in tensors.items():
        parts = name.split(".")
        assert parts[:2] == ["base_model", "model"] and parts[-1] == "weight"
        assert parts[-2] in ("lora_A", "lora_B") and parts[-3] in TARGETS
        assert tensor.shape[0 if parts[-2] == "lora_A" else 1] == config["r"]
        assert tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["moelora-task", "poly", "mhr"])
def test_each_task_of_a_table_is_one_lora(
    name: str, tiny_model, tiny_batch, logits_of, randomize, tmp_path
):
    config = MoloraConfig.from_method(name, task_type="CAUSAL_LM", lora_dropout=0.0)
    model = randomize(get_peft_model(tiny_model("llama"), config).eval())
    batch, found = tiny_batch("llama"), []
    for task in (0, 2):
        expected = logits_of(model, {**batch, "routing_task_ids": torch.tensor([task, task])})
        molora.fix_routing(model, task=task)
        molora.export_lora(model, tmp_path / str(task))
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / str(task))
        assert loaded.peft_config["default"].peft_type == "LORA"
        found.append(logits_of(loaded, batch))
        torch.testing.assert_close(found[-1], expected, **CLOSE)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_each_expert_by_itself(build, tiny_model, tiny_batch, logits_of, tmp_path):
    model = build(num_experts=[2, 3], num_shared_experts=1)
    molora.export_experts(model, tmp_path / "experts")
    names = sorted(path.name for path in (tmp_path / "experts").iterdir() if path.is_dir())
    assert names == ["e0", "e1", "e2", "shared0"]
    batch = tiny_batch("llama")
    for number, name in enumerate(["e0", "e1"]):
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "experts" / name)
        one_hot = {
            site: [float(e == number) for e in range(len(layer.molora_experts["default"].ranks))]
            for site, layer in adapted_layers(model).items()
        }
        molora.fix_routing(model, {site: [*w, 0.0] for site, w in one_hot.items()})
        with molora.static_routing(model):
            expected = logits_of(model, batch)
        torch.testing.assert_close(logits_of(loaded, batch), expected, **CLOSE)
    last = load_file(tmp_path / "experts" / "e2" / "adapter_model.safetensors")
    assert all(".layers.1." in name for name in last)
    PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "experts" / "e2")


def test_conv1d_is_written_as_lora_keeps_it(build, tiny_model, tiny_batch, logits_of, tmp_path):
    model = build("gpt2", num_experts=0, num_shared_experts=2, target_modules=["c_attn", "c_fc"])
    molora.export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "lora")
    batch = tiny_batch("gpt2")
    torch.testing.assert_close(
        logits_of(loaded, batch), logits_of(model, batch), rtol=1e-4, atol=1e-4
    )


SCRIPT = """
import sys
sys.modules["molora"] = None  # importing it is an error now
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
base, adapter, expected = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
known = load_file(expected)
with torch.no_grad():
    logits = model(input_ids=known["ids"]).logits
torch.testing.assert_close(logits, known["logits"], rtol=1e-4, atol=1e-4)
print("equal")
"""


def test_a_process_without_this_library_loads_it(build, tiny_batch, logits_of, tmp_path):
    model = build(gate="uniform", router="random", num_experts=3)
    ids = tiny_batch("llama")["input_ids"]
    logits = logits_of(model, {"input_ids": ids})
    save_file({"ids": ids, "logits": logits}, tmp_path / "expected.safetensors")
    molora.export_lora(model, tmp_path / "lora")
    with model.disable_adapter():
        model.unload().save_pretrained(tmp_path / "base")
    arguments = [tmp_path / "base", tmp_path / "lora", tmp_path / "expected.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("equal")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\], which no LoRA file"),
        ({"bias": "all"}, "has bias='all'"),
        ({"trainable_token_indices": [1, 2]}, "has trainable_token_indices"),
    ],
)
def test_what_a_lora_file_can_not_hold_is_refused(build, fields, message, tmp_path):
    model = build(num_experts=0, num_shared_experts=1, **fields)
    with pytest.raises(ValueError, match=message):
        molora.export_lora(model, tmp_path / "lora")


@pytest.mark.parametrize("dtype", [torch.int32, "bf16"], ids=repr)
def test_factors_are_written_as_numbers_with_fractions(dtype, build, tmp_path):
    model = build(num_experts=0, num_shared_experts=1)
    with pytest.raises(ValueError, match=f"dtype={dtype!r} must be one of floating point"):
        molora.export_lora(model, tmp_path / "lora", dtype=dtype)
    assert not (tmp_path / "lora").exists()


def test_an_interruption_leaves_nothing_that_loads(build, tmp_path, monkeypatch):
    model = build(num_experts=0, num_shared_experts=1)
    kept = molora.export_lora(model, tmp_path / "kept")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("molora.export.peft_folder.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        molora.export_lora(model, tmp_path / "new")
    with pytest.raises(OSError, match="No space left"):
        molora.export_lora(model, kept, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


def test_a_folder_is_replaced_only_when_asked(build, tmp_path):
    model = build(num_experts=0, num_shared_experts=1)
    (tmp_path / "lora").mkdir()
    molora.export_lora(model, tmp_path / "lora")
    with pytest.raises(FileExistsError, match="lora is not an empty folder"):
        molora.export_lora(model, tmp_path / "lora")
    (tmp_path / "lora" / "left.txt").touch()
    molora.export_lora(model, tmp_path / "lora", overwrite=True)
    names = {path.name for path in (tmp_path / "lora").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is not an empty folder"):
        molora.export_lora(model, tmp_path / "file", overwrite=True)
