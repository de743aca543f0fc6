"""What leaves the library loads where it isn't installed, whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import molora
from molora import MoloraConfig
from molora.export import save_merged
from molora.layer import adapted_layers

from ..killed import kill_while

IDS = torch.tensor([[5, 9, 33, 12, 60, 7]])
TARGETS = ["q_proj", "gate_proj", "down_proj"]


@pytest.fixture
def build(tiny_model, randomize):
    def make(**fields: Any) -> Any:
        settings = {"r": 2, "num_experts": 3, "target_modules": TARGETS, **fields}
        config = MoloraConfig(task_type="CAUSAL_LM", **settings)
        return randomize(get_peft_model(tiny_model("llama"), config).eval())

    return make


SCRIPT = """
import sys
sys.modules["molora"] = sys.modules["molora_kernels"] = None  # importing them is an error now
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
known = load_file("known.safetensors")
for folder in ("merged", "moe"):
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(known["ids"]).logits
    torch.testing.assert_close(logits, known[folder], rtol=1e-4, atol=1e-4)
for number in range(3):
    base = AutoModelForCausalLM.from_pretrained("base")
    expert = PeftModel.from_pretrained(base, f"experts/e{number}").eval()
    with torch.no_grad():
        logits = expert(known["ids"]).logits
    torch.testing.assert_close(logits, known[f"e{number}"], rtol=1e-4, atol=1e-4)
print("equal")
"""


@pytest.mark.slow
@torch.no_grad()
def test_a_process_without_this_library_computes_the_same(build, tiny_model, logits_of, tmp_path):
    batch, known = {"input_ids": IDS}, {"ids": IDS}
    tiny_model("llama").save_pretrained(tmp_path / "base")
    networks = build(mixing="feed_forward", target_modules=["up_proj", "down_proj"])
    known["moe"] = logits_of(networks, batch)
    molora.export_moe(networks, tmp_path / "moe")
    routed = build()
    molora.export_experts(routed, tmp_path / "experts")
    for number in range(3):
        molora.fix_routing(routed, [float(e == number) for e in range(3)])
        with molora.static_routing(routed):
            known[f"e{number}"] = logits_of(routed, batch)
    constant = build(gate="uniform", router="random")
    known["merged"] = logits_of(constant, batch)
    save_merged(constant, tmp_path / "merged")
    save_file(known, tmp_path / "known.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("equal")


def adapters(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.rglob("adapter_config.json"))


def test_every_folder_keeps_the_rules_of_vllms_loader(build, tmp_path):
    """Names end in lora_A.weight or lora_B.weight, of known modules, of one rank that is the
    configuration's and no larger than the engine's; nothing beside LoRA."""
    model = build(num_experts=[2, 3], num_shared_experts=1, r={".*q_proj": 3, ".*": 2})
    molora.export_experts(model, tmp_path / "experts")
    molora.export_bundle(model, tmp_path / "bundle")
    molora.fix_routing(model, {site: [0.5] * len(layer.molora_allocation["default"].ranks)
                               for site, layer in adapted_layers(model).items()})  # fmt: skip
    molora.export_lora(model, tmp_path / "cut", rank=4)
    found = adapters(tmp_path)
    assert len(found) == 4 + 4 + 1
    for folder in found:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["modules_to_save"] is None
        assert config["bias"] == "none" and not config["use_dora"] and config["r"] <= 4
        assert {path.name for path in folder.iterdir()} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        }  # fmt: skip
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            module, factor, kind = name.rsplit(".", 2)
            assert kind == "weight" and factor in ("lora_A", "lora_B")
            targets = {target.rpartition(".")[2] for target in config["target_modules"]}
            assert module.rpartition(".")[2] in targets
            assert tensor.shape[0 if factor == "lora_A" else 1] == config["r"]
            assert f"{module}.lora_{'B' if factor == 'lora_A' else 'A'}.weight" in tensors


def bundle(model: Any, folder: Path) -> None:
    molora.export_bundle(model, folder, overwrite=True)


def moe(model: Any, folder: Path) -> None:
    molora.export_moe(model, folder, overwrite=True, shard_bytes=10_000)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("export", [bundle, moe])
def test_a_killed_export_leaves_the_old_folder_or_the_new(export: Any, build, tmp_path):
    fields = {"mixing": "feed_forward", "target_modules": ["up_proj"]} if export is moe else {}
    model = build(**fields)
    folder = tmp_path / "out"
    export(model, folder)
    expected = contents(folder)

    for moment in range(8):
        kill_while(lambda: export(model, folder), 0.004 * moment)
        # Between two renames the folder is under neither name for a moment, and never in part.
        assert not folder.exists() or contents(folder) == expected
    visible = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert visible in ([], ["out"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_refused_by_transformers(damage: str, build, tmp_path):
    model = build(mixing="feed_forward", target_modules=["up_proj"])
    folder = molora.export_moe(model, tmp_path / "moe", shard_bytes=10_000)
    path = sorted(folder.glob("*.safetensors"))[1]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|no such file|does not appear"):
        AutoModelForCausalLM.from_pretrained(folder)


class Hub:
    """Stands in for the Hub: keeps what would be uploaded."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return type("Repo", (), {"repo_id": repo_id})

    def create_commit(self, repo_id: str, operations: list[Any], **kwargs: Any) -> None:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


def test_push_to_hub_uploads_safetensors_and_a_card(build, tiny_model, monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    model = build()
    molora.fix_routing(model, [0.5, 0.25, 0.25])
    model.push_to_hub("somebody/mixture")
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    # Where the repository has no card, transformers puts in its own, as for any PEFT model.
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "transformers"
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    with torch.no_grad(), molora.static_routing(loaded), molora.static_routing(model):
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
