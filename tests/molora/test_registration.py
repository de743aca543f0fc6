"""Every way by which PEFT and transformers reach the tuner, none of which knows it by name.

Trainers are tested where they are used.
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, trainer

import molora
from molora.callback import TrainerHook
from molora.layer import MoloraLayer

FIELDS: dict[str, Any] = {
    "r": [2, 4],
    "num_experts": 3,
    "router_scope": "block",
    "num_shared_experts": 1,
    "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def config(**overrides: Any) -> molora.MoloraConfig:
    return molora.MoloraConfig(**{**FIELDS, **overrides})


def sites(model: Any) -> list[MoloraLayer]:
    return [m for m in model.modules() if isinstance(m, MoloraLayer)]


@pytest.fixture
def base_dir(tiny_model, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def base(base_dir: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(base_dir).eval()


@pytest.fixture
def saved(base_dir: Path, randomize, tiny_batch, logits_of, tmp_path: Path) -> tuple[Path, Any]:
    """A folder with an adapter of the base model, and the logits that belong to it."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base_dir), config()).eval()
    randomize(model).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits_of(model, tiny_batch("llama"))


@pytest.fixture
def assert_logits(tiny_batch, logits_of):
    def check(model: Any, expected: Any) -> None:
        assert torch.equal(logits_of(model.eval(), tiny_batch("llama")), expected)

    return check


def test_get_peft_model_makes_a_molora_model(base):
    model = get_peft_model(base, config())
    assert isinstance(model.base_model, molora.MoloraModel)
    assert len(sites(model)) == 8


def test_saving_writes_weights_and_config(saved):
    folder, _ = saved
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 2 * (4 * 2 + 2)  # A and B of 4 sites, routers of q_proj and down_proj
    assert all(".molora_" in name and "base_layer" not in name for name in weights)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["peft_type"] == "MOLORA"
    assert written["schema_version"] == molora.config.SCHEMA_VERSION


def test_peft_config_from_pretrained(saved):
    folder, _ = saved
    loaded = PeftConfig.from_pretrained(folder)
    assert isinstance(loaded, molora.MoloraConfig)
    assert (loaded.r, loaded.router_scope, loaded.num_experts) == ([2, 4], "block", 3)


def test_peft_model_from_pretrained(saved, base, assert_logits):
    folder, logits = saved
    assert_logits(PeftModel.from_pretrained(base, folder), logits)


def test_peft_model_from_pretrained_without_initialising(saved, base, assert_logits):
    folder, logits = saved
    assert_logits(PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True), logits)


def test_auto_peft_model(saved, assert_logits):
    folder, logits = saved
    assert_logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder), logits)


def test_peft_load_adapter_beside_another_one(saved, base, assert_logits):
    folder, logits = saved
    model = get_peft_model(base, config(router_scope="site", num_experts=2))
    model.load_adapter(folder, adapter_name="second")
    model.set_adapter("second")
    assert_logits(model, logits)


@pytest.mark.parametrize("by_state_dict", [False, True])
def test_inject_and_exchange_a_state_dict(saved, base, assert_logits, by_state_dict: bool):
    folder, logits = saved
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    model = peft.inject_adapter_in_model(
        config(), base, state_dict=weights if by_state_dict else None
    )
    set_peft_model_state_dict(model, weights)
    assert_logits(model, logits)
    again = get_peft_model_state_dict(model)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_transformers_load_adapter(saved, base, assert_logits):
    folder, logits = saved
    base.load_adapter(str(folder))
    assert len(sites(base)) == 8
    assert_logits(base, logits)


def test_transformers_load_adapter_from_tensors(saved, base, assert_logits):
    folder, logits = saved
    weights = load_file(folder / "adapter_model.safetensors")
    base.load_adapter(adapter_state_dict=weights, peft_config=config())
    assert_logits(base, logits)


def test_transformers_from_pretrained_of_an_adapter_folder(saved, assert_logits):
    folder, logits = saved
    assert_logits(AutoModelForCausalLM.from_pretrained(folder), logits)


def test_transformers_add_disable_save_and_load(
    base, base_dir, randomize, tiny_batch, logits_of, assert_logits, tmp_path
):
    plain = logits_of(base, tiny_batch("llama"))
    base.add_adapter(config())
    randomize(base).eval()
    adapted = logits_of(base, tiny_batch("llama"))
    assert not torch.equal(adapted, plain)
    base.disable_adapters()
    assert_logits(base, plain)
    base.enable_adapters()
    base.set_adapter("default")
    assert_logits(base, adapted)
    base.save_pretrained(tmp_path / "native")
    assert_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "native"), adapted)
    reloaded = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base_dir), tmp_path / "native"
    )
    assert_logits(reloaded, adapted)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # two adapters
def test_transformers_switch_and_delete(base, randomize, tiny_batch, logits_of, assert_logits):
    plain = logits_of(base, tiny_batch("llama"))
    base.add_adapter(config(), adapter_name="first")
    first = logits_of(randomize(base, seed=1), tiny_batch("llama"))
    base.add_adapter(config(router_scope="layer", num_shared_experts=0), adapter_name="second")
    base.set_adapter("second")
    assert_logits(base, plain)
    base.set_adapter("first")
    assert_logits(base, first)
    base.delete_adapter("second")
    assert_logits(base, first)
    base.delete_adapter("first")
    assert_logits(base, plain)
    assert [n for n, _ in base.named_parameters() if "molora_" in n] == []


def test_peft_delete_leaves_nothing_of_the_adapter(base, tiny_batch, logits_of, randomize):
    model = get_peft_model(base, config(losses={"z_loss": 0.1})).eval()
    expected = logits_of(randomize(model), tiny_batch("llama"))
    model.add_adapter("second", config(router_scope="layer", num_experts=5))
    model.delete_adapter("second")
    assert torch.equal(logits_of(model, tiny_batch("llama")), expected)
    for layer in sites(model):
        for name in layer.adapter_layer_names + layer.other_param_names:
            assert "second" not in getattr(layer, name)
    assert [n for n in model.state_dict() if "second" in n] == []


def test_layer_status_names_the_layers(base):
    model = get_peft_model(base, config())
    status = model.get_model_status()
    assert (status.peft_types, status.num_adapter_layers) == ({"default": "MOLORA"}, 8)
    assert {s.module_type for s in model.get_layer_status()} == {"molora.Linear"}


def test_registering_twice_changes_nothing():
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    molora.register()
    assert before == (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)
    assert trainer.DEFAULT_CALLBACKS.count(TrainerHook) == 1
