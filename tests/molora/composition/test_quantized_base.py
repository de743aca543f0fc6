"""Fitting to a base model of 4 bits."""

import importlib.util

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import molora


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_weights_fitted_after_a_ranking_are_those_fitted_before(tiny_model, save_loras, tmp_path):
    """bitsandbytes repacks a CPU's weights in a pass without gradients; they give none then."""
    sizes = {"hidden_size": 128, "intermediate_size": 128}
    tiny_model("llama", **sizes).save_pretrained(tmp_path / "base")
    spec = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"]}
    root = tmp_path / "loras"
    folders = save_loras(lambda: tiny_model("llama", **sizes), [spec, spec], root)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    batches = [{"input_ids": ids, "labels": ids}]
    found = []
    for ranked in (False, True):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
        if ranked:
            molora.rank_adapters(model, folders, batches)
        found.append(molora.fit_weights(model, folders, batches, steps=3))
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[0] != pytest.approx([0.5, 0.5], abs=1e-2)
