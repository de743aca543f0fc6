"""The bundle, through a reader that knows torch and safetensors alone."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import molora
from molora import MoloraConfig
from molora.export.fingerprint import base_fingerprint
from molora.layer import adapted_layers

READER = Path(__file__).resolve().parents[3] / "examples" / "read_bundle.py"
TARGETS = ["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": [2, 3], "num_experts": [3, 4]},
    "top_k_unnormalized": {"gate": "top_k_unnormalized", "top_k": 1},
    "switch": {"gate": "switch"},
    "dense, temperature, bias": {
        "gate": "dense", "router_options": {"temperature": 0.7, "bias": True},
    },
    "dense in training": {"gate": "dense_training", "top_k": 2},
    "dense in training, renormalised": {
        "gate": "dense_training", "top_k": 3, "gate_options": {"renormalize": True},
    },
    "sigmoid": {"gate": "sigmoid", "gate_options": {"scale": 2.5, "update_rate": 0.1}},
    "top_p": {"gate": "top_p", "gate_options": {"p": 0.6, "renormalize": True}},
    "threshold": {"gate": "threshold", "gate_options": {"threshold": 0.2}},
    "threshold at 1/E": {"gate": "threshold", "gate_options": {"renormalize": False}},
    "block, shared experts": {"router_scope": "block", "num_shared_experts": 2},
    "layer, own ranks": {"router_scope": "layer", "r": {".*": [1, 2, 3, 2]}},
    "rank-wise": {"rank_wise": True, "num_experts": 2, "r": 3},
    "one A": {"experts": "shared_a"},
    "an expert for each module": {
        "experts": "module_adapters", "expert_options": {"modules": TARGETS}, "num_experts": 5,
        "router_scope": "layer",
    },
    "an unrouted site": {"num_experts": {".*q_proj": 1, ".*": 3}},
}  # fmt: skip


@pytest.fixture(scope="module")
def reader():
    spec = importlib.util.spec_from_file_location("read_bundle", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(tiny_model, randomize):
    def make(**fields: Any) -> Any:
        settings = {"r": 2, "num_experts": 4, "target_modules": TARGETS, **fields}
        model = randomize(get_peft_model(tiny_model("llama"), MoloraConfig(**settings)))
        for layer in adapted_layers(model).values():
            bias = (
                getattr(layer.molora_gate["default"], "bias", None) if layer.molora_gate else None
            )
            if bias is not None:
                bias.steps += torch.arange(len(bias.steps), dtype=torch.int32) - 1
        return model

    return make


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_the_reader_reproduces_the_vectors(build, reader, fields, tmp_path):
    model = build(lora_dropout=0.1, **fields).train()
    molora.export_bundle(model, tmp_path / "bundle")
    assert reader.check(tmp_path / "bundle") == len(adapted_layers(model))
    assert all(module.training for module in model.modules())


def test_the_vectors_are_what_the_model_computes(build, tmp_path):
    model = build(num_shared_experts=1, router_scope="block").eval()
    molora.export_bundle(model, tmp_path / "bundle")
    vectors = load_file(tmp_path / "bundle" / "parity.safetensors")
    for site, layer in adapted_layers(model).items():
        if "default" not in layer.molora_router:
            continue
        x = vectors[f"{site}.input"]
        with torch.no_grad(), molora.observe(model) as records:
            change = layer(x) - layer.get_base_layer()(x)
        torch.testing.assert_close(change, vectors[f"{site}.output"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(records[site].weights, vectors[f"{site}.weights"])


def test_the_manifest_says_what_an_engine_asks(build, tiny_model, tmp_path):
    model = build(gate="top_p", router_scope="block")
    molora.export_bundle(model, tmp_path / "bundle", dtype=torch.bfloat16)
    manifest = json.loads((tmp_path / "bundle" / "routing.json").read_text())
    assert manifest["schema_version"] == 1 and manifest["dtype"] == "bfloat16"
    assert manifest["base"]["fingerprint"] == base_fingerprint(tiny_model("llama"))
    assert manifest["gate"]["p"] == 0.8 and manifest["router"]["compute_dtype"] == "float32"
    sites = {site["name"]: site for site in manifest["sites"]}
    assert list(sites) == list(adapted_layers(model))
    q, k = (f"model.layers.1.self_attn.{name}_proj" for name in "qk")
    assert sites[q]["router_site"] == sites[k]["router_site"] == q
    assert sites[q]["fused_group"] == sites[k]["fused_group"]
    assert sites[q]["ranks"] == [2, 2, 2, 2] and sites[q]["shared_ranks"] == []
    for name in ("e0", "e3"):
        loaded = PeftModel.from_pretrained(
            tiny_model("llama"), tmp_path / "bundle" / "experts" / name
        )
        assert loaded.peft_config["default"].r == 2


def test_the_fingerprint_knows_the_base_and_not_its_dtype(build, tiny_model):
    base = tiny_model("llama").bfloat16()
    expected = base_fingerprint(base)
    assert base_fingerprint(base.float()) == expected
    config = MoloraConfig(target_modules=TARGETS)
    assert base_fingerprint(get_peft_model(base, config)) == expected
    assert base_fingerprint(tiny_model("llama", seed=1)) != expected


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing", "schema"])
def test_a_damaged_bundle_is_refused(build, reader, damage, tmp_path):
    molora.export_bundle(build(), tmp_path / "bundle")
    path = tmp_path / "bundle" / "experts" / "e1" / "adapter_model.safetensors"
    message = "e1/adapter_model.safetensors is not the file that was written"
    if damage == "changed":
        tensors = load_file(path)
        next(iter(tensors.values()))[0, 0] += 1
        save_file(tensors, path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "missing":
        path.unlink()
        message = "incomplete: experts/e1/adapter_model.safetensors is missing"
    else:
        manifest = tmp_path / "bundle" / "routing.json"
        manifest.write_text(
            manifest.read_text().replace('"schema_version": 1', '"schema_version": 9')
        )
        message = "not a molora bundle of schema 1"
    with pytest.raises(ValueError, match=message):
        reader.check(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"gate": "learned_threshold"},
            "unknown gate for a bundle 'learned_threshold'; known: dense",
        ),
        (
            {"gate": "threshold", "gate_options": {"threshold": 0.2, "most": 2}},
            "gate option most=2 of 'threshold' can't be said in a bundle",
        ),
        ({"router": "mlp"}, "unknown router for a bundle 'mlp'; known: linear"),
        ({"num_experts": 1}, "routes nothing; molora.export_lora writes it exactly"),
        ({"modules_to_save": ["lm_head"]}, "which no LoRA file holds"),
    ],
)
def test_what_would_not_be_faithful_is_refused_by_name(build, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        molora.export_bundle(build(**fields), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_the_reader_needs_nothing_of_this_library(build, tmp_path):
    molora.export_bundle(build(), tmp_path / "bundle")
    script = (
        "import sys, runpy; sys.modules['molora'] = sys.modules['peft'] = None; "
        f"sys.argv = ['', 'bundle']; runpy.run_path({str(READER)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "10 sites compute what the bundle says", done.stderr
