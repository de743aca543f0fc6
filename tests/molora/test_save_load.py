"""Adapters on disk: exact, or refused with a message that says why; dtypes as PEFT's LoRA."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import molora
from molora.config import SCHEMA_VERSION

from .cases import Case, every_case
from .killed import kill_while

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def saved(tiny_model, randomize, tmp_path: Path) -> Path:
    """A folder with an adapter of the tiny Llama."""
    model = get_peft_model(tiny_model("llama"), molora.MoloraConfig(r=2, task_type="CAUSAL_LM"))
    randomize(model).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@every_case
def test_what_is_saved_is_what_is_loaded(
    case: Case, build, tiny_model, tiny_batch, logits_of, tmp_path
):
    model = build(case, losses=case.losses)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    ours = {n: p for n, p in model.state_dict().items() if ".molora_" in n}
    theirs = {n: p for n, p in loaded.state_dict().items() if ".molora_" in n}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
    assert torch.equal(
        logits_of(loaded, tiny_batch("llama")), logits_of(model, tiny_batch("llama"))
    )
    loaded.save_pretrained(tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_base_of_other_shapes_is_refused(saved: Path, tiny_model):
    base = tiny_model("llama", hidden_size=64)
    with pytest.raises(ValueError, match=r"fit this base model: .* \(16, 32\).* \(16, 64\)"):
        PeftModel.from_pretrained(base, saved)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # transformers' own words
        tiny_model("llama", hidden_size=64).load_adapter(str(saved))


def test_missing_tensors_are_named(saved: Path, tiny_model):
    tensors = load_file(saved / WEIGHTS)
    missing = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != missing}, saved / WEIGHTS)
    with pytest.raises(ValueError, match=r"lacks 1 of the 12 tensors .*layers\.0.*molora_experts"):
        PeftModel.from_pretrained(tiny_model("llama"), saved)


def test_a_base_with_fewer_layers_is_refused(saved: Path, tiny_model):
    base = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"no place for 6 of its tensors, .*layers\.1\..* among"):
        PeftModel.from_pretrained(base, saved)


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _empty(content: bytes) -> bytes:
    return b""


def _overwritten(content: bytes) -> bytes:
    return b"\xff" * 64 + content[64:]


@pytest.mark.parametrize("damage", [_truncated, _empty, _overwritten])
def test_a_damaged_file_is_named(saved: Path, tiny_model, damage: Any):
    path = saved / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    for load in (PeftModel.from_pretrained, _load_beside_another):
        with pytest.raises(ValueError, match=f"{path}.*corrupted or incomplete"):
            load(tiny_model("llama"), saved)
    with pytest.raises(SafetensorError, match="header"):  # transformers' own words
        tiny_model("llama").load_adapter(str(saved))


def _load_beside_another(base: Any, folder: Path) -> None:
    config = molora.MoloraConfig(num_experts=2, task_type="CAUSAL_LM")
    get_peft_model(base, config).load_adapter(folder, adapter_name="second")


def test_a_newer_schema_is_refused(saved: Path, tiny_model):
    config = json.loads((saved / CONFIG).read_text())
    config.update(schema_version=SCHEMA_VERSION + 1, gate="a gate of the future")
    (saved / CONFIG).write_text(json.dumps(config))
    for load in (PeftConfig.from_pretrained, molora.MoloraConfig.from_pretrained):
        with pytest.raises(
            ValueError, match=rf"schema_version {SCHEMA_VERSION + 1}.*upgrade molora"
        ):
            load(saved)
    with pytest.raises(ValueError, match="upgrade molora"):
        PeftModel.from_pretrained(tiny_model("llama"), saved)


def test_a_failed_save_leaves_the_previous_adapter(saved: Path, tiny_model, randomize, monkeypatch):
    before = {name: (saved / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    model = PeftModel.from_pretrained(tiny_model("llama"), saved)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", full_disk)
        with pytest.raises(OSError, match="no space"):
            model.save_pretrained(saved)
    assert {name: (saved / name).read_bytes() for name in before} == before
    assert {path.name for path in saved.iterdir()} == {WEIGHTS, CONFIG, "README.md"}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_save_leaves_the_old_adapter_or_the_new(saved: Path, tiny_model):
    old = load_file(saved / WEIGHTS)
    model = PeftModel.from_pretrained(tiny_model("llama"), saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    for moment in range(10):
        kill_while(lambda: model.save_pretrained(saved), 0.002 * moment)
        PeftModel.from_pretrained(tiny_model("llama"), saved)
        found = load_file(saved / WEIGHTS)
        whole = all(torch.equal(found[name], value) for name, value in old.items())
        assert found.keys() == old.keys()
        assert whole or not any(value.any() for value in found.values())


@pytest.fixture
def lora_twins(tiny_model):
    """`lora_twins(dtype, autocast)`: PEFT's LoRA, and ours with the same numbers."""

    def build(dtype: torch.dtype, **kwargs: Any) -> tuple[Any, Any]:
        fields = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        theirs = get_peft_model(tiny_model("llama").to(dtype), LoraConfig(**fields), **kwargs)
        config = molora.MoloraConfig(num_experts=0, num_shared_experts=1, **fields)
        ours = get_peft_model(tiny_model("llama").to(dtype), config, **kwargs)
        generator = torch.Generator().manual_seed(0)
        for name, layer in theirs.named_modules():
            if hasattr(layer, "lora_A"):
                experts = ours.get_submodule(name).molora_experts["default"]
                for factor, twin in (("A", layer.lora_A), ("B", layer.lora_B)):
                    values = 0.1 * torch.randn(twin["default"].weight.shape, generator=generator)
                    twin["default"].weight.data.copy_(values)
                    getattr(experts, factor).data.copy_(values)
        return theirs.train(), ours.train()

    return build


@pytest.mark.parametrize("context", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_lora_equals_that_of_peft(
    lora_twins, tiny_batch, dtype: torch.dtype, autocast_adapter: bool, context: torch.dtype | None
):
    theirs, ours = lora_twins(dtype, autocast_adapter_dtype=autocast_adapter)
    batch = tiny_batch("llama")
    outputs, gradients, dtypes = [], [], []
    for model in (theirs, ours):
        with torch.autocast("cpu", dtype=context) if context else nullcontext():
            output = model(**batch)
        output.loss.backward()
        outputs.append(output.logits)
        named = {
            n.replace("molora_experts.default.", "lora_").replace(".default.weight", ""): p
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        gradients.append({n: p.grad for n, p in named.items()})
        dtypes.append({n: p.dtype for n, p in named.items()})
    assert dtypes[0] == dtypes[1]
    assert outputs[0].dtype == outputs[1].dtype
    exact = dtype == torch.float32 and context is None
    # Elsewhere the order of roundings differs: a few parts in 2^8 (bf16) or 2^11 (fp16).
    coarse = torch.bfloat16 in (dtype, context)
    tolerance = 1e-6 if exact else (4e-2 if coarse else 5e-3)
    for a, b in zip(outputs, outputs[1:], strict=False):
        assert relative_error(b, a) < tolerance
    for name, gradient in gradients[0].items():
        assert gradients[1][name].dtype == gradient.dtype
        assert relative_error(gradients[1][name], gradient) < tolerance, name


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach().double()
    return float((actual.detach().double() - expected).norm() / expected.norm())
