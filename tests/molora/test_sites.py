"""Layer numbers and blocks, on real architectures that are never given memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from molora.sites import block_of, in_run_order, number_layers, reads_encoder

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
DECODER = {**SMALL, "vocab_size": 8, "num_hidden_layers": 3, "num_key_value_heads": 2}
TOWER = {**SMALL, "num_hidden_layers": 2}
T5 = {"vocab_size": 8, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2}
CLIP = {
    "text_config": {**TOWER, "num_hidden_layers": 3, "vocab_size": 8},
    "vision_config": {**TOWER, "image_size": 8, "patch_size": 4},
    "projection_dim": 8,
}
# model class, config class, config, {beginning of a site's name: its layer}, number of layers
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], dict[str, int | None], int]] = {
    "llama": (
        "LlamaForCausalLM", "LlamaConfig", DECODER,
        {"model.layers.0.": 0, "model.layers.2.": 2, "lm_head": None}, 3,
    ),
    "mistral": (
        "MistralForCausalLM", "MistralConfig", DECODER,
        {"model.layers.0.": 0, "model.layers.2.": 2, "lm_head": None}, 3,
    ),
    "qwen3": (
        "Qwen3ForCausalLM", "Qwen3Config", DECODER,
        {"model.layers.0.": 0, "model.layers.2.": 2, "lm_head": None}, 3,
    ),
    "gemma": (
        "GemmaForCausalLM", "GemmaConfig", DECODER,
        {"model.layers.0.": 0, "model.layers.2.": 2, "lm_head": None}, 3,
    ),
    "mixtral": (
        # its experts are a list inside a layer: the outer list counts
        "MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 2},
        {"model.layers.0.": 0, "model.layers.2.": 2, "lm_head": None}, 3,
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config", {"vocab_size": 8, "n_embd": 16, "n_head": 2, "n_layer": 3},
        {"transformer.h.0.": 0, "transformer.h.2.": 2, "lm_head": None}, 3,
    ),
    "opt": (
        "OPTForCausalLM", "OPTConfig", {**DECODER, "ffn_dim": 16, "word_embed_proj_dim": 16},
        {"model.decoder.layers.0.": 0, "model.decoder.layers.2.": 2, "lm_head": None}, 3,
    ),
    "bert": (
        "BertForSequenceClassification", "BertConfig", {**TOWER, "vocab_size": 8},
        {"bert.encoder.layer.0.": 0, "bert.encoder.layer.1.": 1, "bert.pooler": None,
         "classifier": None}, 2,
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig", {**TOWER, "image_size": 8, "patch_size": 4},
        {"classifier": None}, 2,
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config", {**T5, "num_decoder_layers": 3},
        {"encoder.block.0.": 0, "encoder.block.1.": 1, "decoder.block.0.": 2, "decoder.block.2.": 4,
         "lm_head": None}, 5,
    ),
    "clip": (
        "CLIPModel", "CLIPConfig", CLIP,
        {"text_model.encoder.layers.0.": 0, "text_model.encoder.layers.2.": 2,
         "vision_model.encoder.layers.0.": 3, "vision_model.encoder.layers.1.": 4,
         "visual_projection": None, "text_projection": None}, 5,
    ),
}  # fmt: skip


def empty(name: str) -> nn.Module:
    model_class, config_class, fields, _, _ = ARCHITECTURES[name]
    with torch.device("meta"):
        config = getattr(transformers, config_class)(**fields)
        return getattr(transformers, model_class)(config)


def linears(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_of_an_architecture(name):
    model = empty(name)
    expected, total = ARCHITECTURES[name][3:]
    layers, number = number_layers(model, linears(model))
    assert number == total
    for beginning, layer in expected.items():
        found = {layers[site] for site in layers if site.startswith(beginning)}
        assert found == {layer}, beginning
    assert {layer for layer in layers.values() if layer is not None} == set(range(total))


def test_a_stack_without_sites_does_not_count():
    model = empty("t5")
    decoder = [name for name in linears(model) if name.startswith("decoder")]
    layers, number = number_layers(model, decoder)
    assert number == 3 and layers["decoder.block.0.layer.0.SelfAttention.q"] == 0


def test_a_layer_without_sites_counts():
    model = empty("llama")
    last = "model.layers.2.mlp.up_proj"
    assert number_layers(model, [last]) == ({last: 2}, 3)


def module_of(build: Callable[[], dict[str, nn.Module]]) -> nn.Module:
    model = nn.Module()
    for name, child in build().items():
        model.add_module(name, child)
    return model


def test_plain_modules_are_numbered_in_order():
    model = module_of(lambda: {name: nn.Linear(2, 2) for name in ("up", "middle", "down")})
    assert number_layers(model, ["up", "down"]) == ({"up": 0, "down": 1}, 2)


def test_a_sequential_is_numbered_by_its_children_with_sites():
    model = nn.Sequential(
        nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    )
    assert number_layers(model, linears(model)) == ({"0": 0, "2.0": 1, "2.1": 1, "3": 2}, 3)


def test_a_sequential_beside_single_modules():
    model = module_of(
        lambda: {"stem": nn.Linear(2, 2), "body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))}
    )
    assert number_layers(model, linears(model)) == ({"stem": 0, "body.0": 1, "body.1": 2}, 3)


def test_lists_come_before_sequentials_and_bare_lists_are_layers():
    model = module_of(
        lambda: {
            "layers": nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))]),
            "head": nn.Sequential(nn.Linear(2, 2)),
        }
    )
    expected = {"layers.0": 0, "layers.1.0": 1, "head.0": None}
    assert number_layers(model, linears(model)) == (expected, 2)


def test_no_sites():
    assert number_layers(nn.Sequential(nn.Linear(2, 2)), []) == ({}, 0)


def blocks(names: list[str]) -> set[frozenset[str]]:
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(block_of(name), set()).add(name)
    return {frozenset(group) for group in groups.values()}


def sets(*groups: str, at: str = "") -> set[frozenset[str]]:
    return {frozenset(f"{at}{name}" for name in group.split()) for group in groups}


def test_blocks_of_a_llama_layer():
    names = [f"layers.1.{n}" for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )]  # fmt: skip
    assert blocks(names) == sets(
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj mlp.up_proj", "mlp.down_proj", at="layers.1.",
    )  # fmt: skip


def test_the_same_names_in_another_layer_are_another_block():
    names = [f"layers.{i}.self_attn.{n}_proj" for i in (1, 11) for n in "qk"]
    assert len(blocks(names)) == 2


CROSS = ["EncDecAttention", "encoder_attn", "crossattention", "crossattention.self", "cross_attn"]


@pytest.mark.parametrize("attention", CROSS)
@pytest.mark.parametrize("names", [("q", "k", "v"), ("query", "key", "value")])
def test_in_cross_attention_the_queries_stand_alone(attention, names):
    q, k, v = (f"decoder.layer.0.{attention}.{name}" for name in names)
    assert blocks([q, k, v]) == {frozenset([q]), frozenset([k, v])}


def test_blocks_hold_exactly_the_sites_that_read_the_same_tensor():
    """On a whole T5 with gated feed-forward, by watching what each module is given."""
    config = transformers.T5Config(**T5, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    read: dict[str, int] = {}
    kept = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            kept.append(args[0])  # so that no address is used twice
            read[name] = args[0].data_ptr()

        return hook

    names = [n for n in linears(model) if n != "lm_head"]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    ids = torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids)
    within = {frozenset(g) for g in blocks(names) if len(g) > 1}
    for group in within:
        assert len({read[name] for name in group}) == 1, group
    attention = {n.rpartition(".")[0] for n in names if n.endswith((".k", ".wi_0"))}
    assert len(within) == len(attention)


def test_siblings_are_ordered_as_they_run_and_nothing_else_is():
    # OPT defines keys before the queries that it computes first
    defined = ["attn.k_proj", "attn.v_proj", "attn.q_proj", "attn.out_proj", "fc1", "fc2"]
    run = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "fc1", "fc2"]
    names = [f"layers.{layer}.{name}" for layer in (0, 1) for name in defined]
    assert in_run_order(names) == [f"layers.{i}.{name}" for i in (0, 1) for name in run]


@pytest.mark.parametrize("attention", CROSS)
def test_keys_and_values_of_cross_attention_read_the_encoder(attention):
    names = [f"decoder.layer.0.{attention}.{n}" for n in ("k_proj", "v", "key", "value")]
    assert all(reads_encoder(name) for name in names)
    others = ["q_proj", "query", "q", "o", "out_proj"]
    assert not any(reads_encoder(f"decoder.layer.0.{attention}.{name}") for name in others)
    assert not reads_encoder("decoder.layer.0.self_attn.k_proj")
