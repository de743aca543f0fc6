"""What was calibrated or fixed is saved with the adapter, and is what is merged after loading."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import molora
from molora import MoloraConfig

WEIGHTS = "adapter_model.safetensors"
IDS = torch.tensor([[5, 9, 33, 12, 60, 7]])
BATCHES = [{"input_ids": (IDS + shift) % 60 + 3} for shift in range(4)]


def full(model: Any) -> None:
    molora.calibrate(model, BATCHES, "full", progress=False)


def least_squares(model: Any) -> None:
    molora.calibrate(model, BATCHES, "least_squares", progress=False)


def given(model: Any) -> None:
    molora.fix_routing(model, [0.25, 0.0, 0.75])


@pytest.fixture
def build(tiny_model, randomize):
    def make(**fields: Any) -> Any:
        settings = {"r": 2, "num_experts": 3, "target_modules": ["q_proj", "down_proj"], **fields}
        config = MoloraConfig(task_type="CAUSAL_LM", **settings)
        return randomize(get_peft_model(tiny_model("llama"), config).eval())

    return make


@torch.no_grad()
def static_logits(model: Any) -> torch.Tensor:
    with molora.static_routing(model):
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore:molora. merged an approximation:UserWarning")
@pytest.mark.parametrize("make_static", [full, least_squares, given])
def test_what_is_merged_after_loading_is_what_was_saved(make_static, build, tiny_model, tmp_path):
    model = build()
    routed = model(IDS).logits
    make_static(model)
    expected = static_logits(model)
    assert (expected - routed).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter").eval()
    assert torch.equal(loaded(IDS).logits, routed)  # the forward goes on routing
    assert torch.equal(static_logits(loaded), expected)
    molora.export_lora(loaded, tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    ours = next(iter(molora.layer.adapted_layers(model).values())).molora_static["default"]
    assert ours.source in card
    loaded.save_pretrained(tmp_path / "again")
    for name in (WEIGHTS, "adapter_config.json"):
        ours, theirs = (tmp_path / folder / name for folder in ("adapter", "again"))
        assert ours.read_bytes() == theirs.read_bytes()
    with torch.no_grad():
        merged = loaded.merge_and_unload()(IDS).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    lora = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "lora")
    torch.testing.assert_close(lora(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_another_name(build, tiny_model, tmp_path):
    model = build()
    full(model)
    model.save_pretrained(tmp_path)
    second = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, adapter_name="second")
    assert torch.equal(static_logits(second.eval()), static_logits(model))


def test_the_loader_of_transformers_leaves_it_out(build, tiny_model, tmp_path):
    """It hands PEFT no file; its report lists the entries, and nothing merges by mistake."""
    model = build()
    full(model)
    model.save_pretrained(tmp_path)
    base = tiny_model("llama")
    base.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(base.eval()(IDS).logits, model(IDS).logits)
    layers = molora.layer.adapted_layers(base)
    assert [layer.static_mixture("default") for layer in layers.values()] == [None] * 4


def test_nothing_is_added_where_nothing_was_set(build, tmp_path):
    for fields in ({}, {"gate": "uniform", "router": "random"}):
        model = build(**fields)
        model.save_pretrained(tmp_path)
        assert not [key for key in load_file(tmp_path / WEIGHTS) if "static" in key]


@pytest.mark.parametrize("when", ["before saving", "after saving"])
def test_experts_that_have_changed_since_are_noticed(when: str, build, tiny_model, tmp_path):
    model = build()
    full(model)
    if when == "before saving":
        change(model)
        with pytest.warns(
            UserWarning, match=r"q_proj' and 3 more modules have changed .*not saved"
        ):
            model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
        with pytest.raises(ValueError, match="by token"):
            loaded.merge_and_unload()
        return
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    mixtures = {key: tensor for key, tensor in tensors.items() if "static" in key}
    others = {key: 1.5 * tensor for key, tensor in tensors.items() if "static" not in key}
    save_file({**others, **mixtures}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    for use in (loaded.merge_adapter, lambda: molora.export_lora(loaded, tmp_path / "lora")):
        with pytest.raises(ValueError, match=r"have changed since .* calibrated by full .* again"):
            use()
    assert not os.path.exists(tmp_path / "lora")


def change(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_experts" in name:
                parameter.mul_(1.1)


def test_a_prompt_or_task_that_was_trained_past_is_noticed(build):
    fields = {"router": "task_embedding", "router_options": {"num_tasks": 2}, "gate": "dense"}
    model = build(**fields)
    molora.fix_routing(model, task=1)
    change(model)
    with pytest.raises(ValueError, match=r"have changed since .* routing weights of task 1"):
        model.merge_adapter()


def cut(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key][:-1].clone()


def drop(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[key]


@pytest.mark.parametrize("damage", [cut, drop])
@pytest.mark.parametrize("part", ["about", "B"])
def test_a_damaged_entry_is_named(part: str, damage: Any, build, tiny_model, tmp_path: Path):
    model = build()
    full(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors, next(key for key in tensors if key.endswith(f"q_proj.molora_static.{part}")))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"mixture of 'model\.layers\.0.*q_proj' .* is damaged"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
