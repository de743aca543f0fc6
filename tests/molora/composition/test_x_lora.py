"""A first pass without the adapters weighs them."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlavaConfig

import molora
from molora.composition import plan_composition

from .dense_mixture import by_formula, router_of


@pytest.mark.parametrize(
    "options", [{}, {"hidden_size": 7, "temperature": 0.5}, {"top_k": 2}], ids=str
)
def test_it_is_its_formula(base, folders, batch, logits_of, options):
    model = molora.compose(base(), folders, "x-lora", **options)
    router = router_of(model, "model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        hidden = base().model(**batch).last_hidden_state.flatten(0, 1)
        (first, *more), (shift, *shifts) = router.weights, router.biases
        z = hidden @ first.double().mT + shift
        for weight, bias in zip(more, shifts, strict=True):
            z = z.clamp(min=0) @ weight.double().mT + bias
        w = (z / options.get("temperature", 1.0)).softmax(-1)
        if "top_k" in options:
            w = w * (w >= w.sort(-1).values[:, 1:2])
    expected = by_formula(base(), folders, lambda x, site, dense, present: w, batch)
    torch.testing.assert_close(logits_of(model, batch), expected, atol=1e-10, rtol=1e-10)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {
        "weights",
        "biases",
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {"xlora_depth": 1}),
        ({"hidden_size": 7}, {"xlora_depth": 2, "xlora_size": 7}),
        ({"top_k": 2, "temperature": 0.5}, {"top_k_lora": 2, "softmax_temperature": 0.5}),
    ],
    ids=["linear", "hidden", "top_k"],
)
def test_it_equals_pefts(tiny_model, folders, batch, options, theirs):
    """With the weights of PEFT's classifier, in fp32, which PEFT loads adapters in."""
    base = tiny_model("llama", use_cache=False)
    adapters = {str(e): folder for e, folder in enumerate(folders)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **theirs)
    peer = get_peft_model(base, config).eval()
    classifier = peer.base_model.internal_xlora_classifier
    linear = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
    model = molora.compose(tiny_model("llama"), folders, "x-lora", **options)
    router = router_of(model, "model.layers.0.self_attn.q_proj")
    for weight, bias, own in zip(router.weights, router.biases, linear, strict=True):
        weight.copy_(own.weight)
        bias.copy_(own.bias)
    expected = peer(**batch).logits
    assert (expected - tiny_model("llama")(**batch).logits).abs().max() > 0.1
    torch.testing.assert_close(model(**batch).logits, expected, atol=2e-5, rtol=2e-5)


def test_a_first_module_that_is_not_as_wide_as_the_model(base, batch, tmp_path):
    config = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    get_peft_model(base(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"as wide as the model, 32, and '.*down_proj' has 48"):
        molora.compose(base(), [str(tmp_path)] * 2, "x-lora")
    # Within a whole network it is the network that decides, and that reads the residual stream.
    model = molora.compose(base(), [str(tmp_path)] * 2, "x-lora", mixing="feed_forward")
    router = model.get_base_model().model.layers[0].mlp.molora_router["default"]
    assert router.weights[0].shape == (2, 32)
    with torch.no_grad():  # two equal experts, so any weights give the one adapter
        expected = PeftModel.from_pretrained(base(), str(tmp_path))(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-10, rtol=1e-10)


def test_the_width_of_a_model_that_also_sees(tmp_path):
    """Its configuration has none itself, but that of its language model."""

    def seeing(hidden_size: int) -> nn.Module:
        model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        text = LlamaConfig(hidden_size=hidden_size, num_attention_heads=2)
        model.config = LlavaConfig(text_config=text)
        return model

    plain = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(plain, config).save_pretrained(tmp_path)
    plan_composition(seeing(8), [tmp_path], "x-lora")
    with pytest.raises(ValueError, match=r"as wide as the model, 6, and 'q_proj' has 8 inputs"):
        plan_composition(seeing(6), [tmp_path], "x-lora")


def test_the_module_that_runs_first_decides_not_the_one_defined_first(tmp_path):
    """As in BART, whose cross-attention defines the keys, which read the encoder, before."""

    class CrossAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k_proj, self.q_proj = nn.Linear(8, 6), nn.Linear(6, 6)

    def decoder(hidden_size: int) -> nn.Module:
        model = nn.ModuleDict({"encoder_attn": CrossAttention()})
        model.config = SimpleNamespace(hidden_size=hidden_size)
        return model

    config = LoraConfig(r=2, target_modules=["k_proj", "q_proj"])
    plain = nn.ModuleDict({"encoder_attn": CrossAttention()})
    get_peft_model(plain, config).save_pretrained(tmp_path)
    plan_composition(decoder(6), [str(tmp_path)] * 2, "x-lora")
    with pytest.raises(ValueError, match=r"the model, 8, and 'encoder_attn.q_proj' has 6 inputs"):
        plan_composition(decoder(8), [str(tmp_path)] * 2, "x-lora")
