"""A checkpoint that transformers loads by itself, with the logits of base model and adapter."""

import json
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import molora
from molora import MoloraConfig
from molora.export.moe_config import MIXTRAL, QWEN2_MOE, QWEN3_MOE, sparse_config

IDS = torch.tensor([[5, 9, 33, 12, 60, 7], [44, 3, 17, 8, 9, 1]])
INSIDE = r"mlp\.\w+"
SPLIT = {"num_experts": {INSIDE: 4, ".*": 0}, "num_shared_experts": {INSIDE: 0, ".*": 1}}
ROPE = {"rope_type": "default", "rope_theta": 1234.0}
YARN = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# name -> base model, fields of its configuration, fields of the adapter's
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": ROPE}, {}),
    "tied, scaled rope, own epsilon": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": YARN, "rms_norm_eps": 3e-4},
        {"r": {".*": 3}, "rank_pattern": {"up_proj": 1}, "top_k": 3},
    ),
    "mistral with a window": ("mistral", {"sliding_window": 3}, {}),
    "qwen3": ("qwen3", {"rope_parameters": ROPE}, {"router_options": {"temperature": 0.5}}),
    "qwen2": ("qwen2", {"rope_parameters": ROPE}, {"num_shared_experts": {INSIDE: 2, ".*": 1}}),
    "qwen2, weights that don't sum to 1": ("qwen2", {}, {"gate": "top_k_unnormalized"}),
    "qwen3, weights that don't sum to 1": ("qwen3", {}, {"gate": "switch"}),
    "every expert": ("llama", {}, {"gate": "dense"}),
    "every expert of qwen2": ("qwen2", {}, {"gate": "dense"}),
    "shared experts, some modules": (
        "llama",
        {},
        {"target_modules": ["up_proj", "down_proj"], "num_experts": 3, "num_shared_experts": 1},
    ),
}


@pytest.fixture
def build(tiny_model, randomize):
    def make(name: str = "llama", fields: dict[str, Any] | None = None, **adapter: Any) -> Any:
        if name in ("mistral", "qwen2"):
            plain = tiny_model("llama").config.to_dict()
            kept = {k: plain[k] for k in (
                "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "intermediate_size", "num_key_value_heads", "pad_token_id",
            )}  # fmt: skip
            torch.manual_seed(0)
            kind = name.title()
            settings = getattr(transformers, f"{kind}Config")(**kept, **(fields or {}))
            base = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
            for key, parameter in base.named_parameters():
                if key.endswith("bias"):  # of Qwen2's attention; they start at 0
                    torch.nn.init.normal_(parameter)
        else:
            base = tiny_model(name, **(fields or {}))
        defaults = {"mixing": "feed_forward", "target_modules": "all-linear", "r": 2, **SPLIT}
        model = get_peft_model(base, MoloraConfig(**{**defaults, **adapter}))
        randomize(model)
        for key, parameter in model.named_parameters():
            if key.endswith(".B"):
                parameter.data *= 0.2  # logits near 1
        return model.eval()

    return make


@pytest.mark.parametrize("name, fields, adapter", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_the_adapter(name, fields, adapter, build, logits_of, tmp_path):
    model = build(name, fields, **adapter)
    expected = logits_of(model, {"input_ids": IDS})
    with model.disable_adapter():
        assert not torch.allclose(logits_of(model, {"input_ids": IDS}), expected, atol=0.05)
    folder = molora.export_moe(model, tmp_path / "moe")
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    kinds = {"qwen2": "Qwen2MoeForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}
    assert type(loaded).__name__ == kinds.get(name, "MixtralForCausalLM")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    actual = logits_of(loaded.eval(), {"input_ids": IDS})
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits_of(model, {"input_ids": IDS}), expected)  # left as it was


def test_shards_generation_settings_and_the_tokenizer_stand_beside_it(build, tmp_path):
    model = build()
    model.get_base_model().generation_config.max_new_tokens = 7

    class Words:
        def save_pretrained(self, folder: Any) -> None:
            (folder / "words.txt").write_text("a b c")

    folder = molora.export_moe(model, tmp_path / "moe", Words(), shard_bytes=20_000)
    assert (folder / "words.txt").read_text() == "a b c"
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 7
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and {path.name for path in files} == set(index["weight_map"].values())
    sizes = 0
    for path in files:
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # no mapping
                assert index["weight_map"][key] == path.name
                sizes += tensors.get_tensor(key).numel() * 4
        assert path.stat().st_size < 25_000
    assert index["metadata"]["total_size"] == sizes


def test_an_interrupted_export_leaves_nothing(build, tmp_path, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("molora.export.moe._Shards.finish", fail)
    with pytest.raises(KeyboardInterrupt):
        molora.export_moe(build(), tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mixing": "linear", "num_experts": 4, "num_shared_experts": 0}, "routes experts of its"),
        ({"gate": "top_p"}, "gate='top_k'"),
        ({"gate": "switch"}, "divides the weights .*; train with gate='top_k', or on a Qwen2"),
        ({"router": "mlp"}, "router='linear'"),
        ({"router_options": {"bias": True}}, "linear without bias"),
        ({"layers_to_transform": [0], "target_modules": ["up_proj"]}, r"layers \[1\] have no"),
        ({"num_experts": [2, 3], "num_shared_experts": 0,
          "target_modules": ["up_proj"]}, "different numbers"),
        ({"num_experts": 3, "num_shared_experts": 0}, "'model.layers.0.self_attn.q_proj' routes"),
        ({"bias": "all"}, "bias='all'"),
    ],
)  # fmt: skip
def test_what_the_architecture_does_not_compute_is_refused(fields, message, build, tmp_path):
    with pytest.raises(ValueError, match=message):
        molora.export_moe(build(**fields), tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


def test_a_file_holds_a_byte_at_least(build, tmp_path):
    with pytest.raises(ValueError, match="shard_bytes=0 must be a whole number of at least 1"):
        molora.export_moe(build(), tmp_path / "moe", shard_bytes=0)


def test_other_models_are_refused(build, tmp_path):
    with pytest.raises(ValueError, match="GemmaForCausalLM has no .* known: LlamaForCausalLM"):
        molora.export_moe(build("gemma"), tmp_path / "moe")


def test_a_shared_router_is_refused(build, tmp_path):
    model = build(
        num_experts={INSIDE: 4, ".*": 4}, num_shared_experts=0, router_scope="layer",
        target_modules=["o_proj", "up_proj"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="follows another site's router"):
        molora.export_moe(model, tmp_path / "moe")


@pytest.mark.parametrize(
    "config, family, field",
    [
        (transformers.LlamaConfig(attention_bias=True), MIXTRAL, "attention_bias"),
        (transformers.LlamaConfig(mlp_bias=True), MIXTRAL, "mlp_bias"),
        (
            transformers.Qwen3Config(
                use_sliding_window=True, sliding_window=8, max_window_layers=1
            ),
            QWEN3_MOE,
            "layer_types",
        ),
    ],
)
def test_fields_that_cannot_be_carried_are_refused(config, family, field: str):
    with pytest.raises(ValueError, match=f"no '{field}'"):
        sparse_config(config, family, 4, 2, True)


def test_a_quantised_base_is_refused():
    config = transformers.LlamaConfig(quantization_config={"load_in_4bit": True})
    with pytest.raises(ValueError, match="load it unquantised"):
        sparse_config(config, MIXTRAL, 4, 2, True)


@pytest.mark.parametrize(
    "config, family",
    [
        (transformers.LlamaConfig(), MIXTRAL),
        (transformers.MistralConfig(), MIXTRAL),
        (transformers.Qwen2Config(), QWEN2_MOE),
        (transformers.Qwen3Config(), QWEN3_MOE),
    ],
)
def test_every_field_is_carried(config, family):
    config.note = "of the user's own"
    config.attention_dropout = 0.125
    config.rope_parameters = ROPE
    sparse = sparse_config(config, family, 4, 2, True).to_dict()
    lost = {
        field
        for field, value in config.to_dict().items()
        if field not in sparse or sparse[field] != value
    }
    if config.model_type == "qwen2":  # which has no window, and calls that 0
        assert config.sliding_window is None and sparse["sliding_window"] == 0
        lost -= {"sliding_window"}
    assert lost <= set(family.lacks) | {"model_type", "architectures"}
    assert sparse.get("num_local_experts", sparse.get("num_experts")) == 4
    assert sparse["num_experts_per_tok"] == 2
