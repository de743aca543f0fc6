"""Quantised base models: through PEFT's backend interface, and with bitsandbytes."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import molora
import molora.layer
import molora.model
from molora.layer import MoloraLayer
from molora.quantized import keep_4bit_layout

TARGETS = ["q_proj", "k_proj", "down_proj"]
# PEFT reads the fake's in_features and out_features all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type.*Int8Linear:UserWarning")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


class Int8Linear(nn.Module):
    """y = scale * W x with W in int8; the result lives in a buffer that the next call reuses."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax() / 60)  # room to merge
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.quantize(linear.weight.detach())
        self.workspace = torch.empty(0)

    def quantize(self, weight: Tensor) -> None:
        levels = (weight / self.scale).round().clamp(-127, 127).to(torch.int8)
        self.weight = nn.Parameter(levels, requires_grad=False)

    def dequantize(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.dequantize().T.to(x.dtype)
        if torch.is_grad_enabled():
            return y
        if self.workspace.shape != y.shape:
            self.workspace = torch.empty_like(y)
        return self.workspace.copy_(y)


class Int8Backend(QuantizationBackend):
    layer_type = "linear"
    supports_merge = True
    backend_name = "int8 of the tests"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        peft_layer.get_base_layer().quantize(weight_data)

    def maybe_clone_base_result(self, x: Tensor) -> Tensor:
        return x.clone()


def resolve(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    return Int8Backend() if isinstance(base_layer, Int8Linear) else None


@pytest.fixture
def quantized(tiny_model, monkeypatch) -> Any:
    """`quantized()`: a tiny Llama whose target modules are `Int8Linear`."""
    for module in (molora.layer, molora.model):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve)

    def build() -> Any:
        model = tiny_model("llama")
        for name, module in list(model.named_modules()):
            if name.endswith(tuple(TARGETS)):
                model.set_submodule(name, Int8Linear(module))
        return model

    return build


def config(**overrides: Any) -> molora.MoloraConfig:
    fields = {"r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return molora.MoloraConfig(**{**fields, **overrides})


def layers(model: Any) -> list[MoloraLayer]:
    return [m for m in model.modules() if isinstance(m, MoloraLayer)]


def check_life_of_an_adapter(
    base: Any, again: Any, batch: dict[str, Tensor], randomize: Any, logits_of: Any, folder: Path
) -> None:
    """Identity at first, gradients everywhere, and the same after a save and a load."""
    model = get_peft_model(base, config(router_scope="block", losses={"load_balancing": 0.01}))
    with model.disable_adapter():
        plain = logits_of(model, batch)
    assert torch.equal(logits_of(model, batch), plain)
    randomize(model).train()
    model(**batch).loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable and all(p.is_floating_point() and p.grad.abs().sum() > 0 for p in trainable)
    expected = logits_of(model.eval(), batch)
    assert not torch.allclose(expected, plain)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(again, folder).eval()
    torch.testing.assert_close(logits_of(loaded, batch), expected)


def test_a_quantised_base_through_the_backend(
    quantized, tiny_batch, randomize, logits_of, tmp_path: Path
):
    batch = tiny_batch("llama")
    check_life_of_an_adapter(quantized(), quantized(), batch, randomize, logits_of, tmp_path)


def test_the_bases_own_result_is_not_written_to(quantized, tiny_batch, randomize, logits_of):
    model = randomize(get_peft_model(quantized(), config()).eval())
    logits_of(model, tiny_batch("llama"))
    layer = layers(model)[0]
    assert isinstance(layer.quantization_backend, Int8Backend)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = layer(x)
        assert torch.equal(layer.base_layer.workspace, x @ layer.base_layer.dequantize().T)
        assert not torch.equal(result, layer.base_layer.workspace)


@pytest.mark.parametrize(
    "fields",
    [{"num_experts": 0, "num_shared_experts": 1}, {"gate": "uniform", "router": "random"}],
    ids=["unrouted", "all tokens alike"],
)
def test_a_static_adapter_merges_into_the_quantised_weight(
    quantized, tiny_batch, randomize, logits_of, fields
):
    batch = tiny_batch("llama")
    model = get_peft_model(quantized(), config(**fields)).eval()
    for layer in layers(randomize(model)):
        layer.molora_experts["default"].B.data *= 0.005
    expected, weights = logits_of(model, batch), [m.base_layer.dequantize() for m in layers(model)]
    step = max(float(m.base_layer.scale) for m in layers(model))
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model, batch), expected, atol=0.05, rtol=0.05)
    assert all(m.base_layer.weight.dtype == torch.int8 for m in layers(model))
    model.unmerge_adapter()
    for layer, weight in zip(layers(model), weights, strict=True):
        # merging and unmerging each round once
        torch.testing.assert_close(layer.base_layer.dequantize(), weight, atol=1.01 * step, rtol=0)


def test_a_16_bit_adapter_routes_in_fp32(quantized, tiny_batch, randomize):
    """TRL casts every trainable parameter of a quantised model to bf16."""
    model = randomize(get_peft_model(quantized(), config())).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with molora.observe(model) as records:
        model(**tiny_batch("llama")).loss.backward()
    for routing in records.values():
        assert {routing.weights.dtype, routing.logits.dtype, routing.probs.dtype} == {torch.float32}
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in grads)


def test_something_that_is_no_linear_is_refused(quantized):
    with pytest.raises(ValueError, match=r"'model\.embed_tokens' is a Embedding; supported are"):
        get_peft_model(quantized(), config(target_modules=["embed_tokens"]))


@pytest.fixture(params=["4bit", "8bit"])
def bitsandbytes_model(request: pytest.FixtureRequest, tiny_model, tmp_path: Path) -> Any:
    """`bitsandbytes_model()`: a tiny Llama in four or eight bits."""
    tiny_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    quantization = BitsAndBytesConfig(
        **(bits if request.param == "4bit" else {"load_in_8bit": True})
    )

    def build() -> Any:
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, dtype=torch.float32
        ).eval()

    return build


@needs_bitsandbytes
def test_bitsandbytes(bitsandbytes_model, tiny_batch, randomize, logits_of, tmp_path: Path):
    base = bitsandbytes_model()
    quantised = type(base.model.layers[0].self_attn.q_proj).__name__
    assert quantised in ("Linear4bit", "Linear8bitLt")
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    again, batch = bitsandbytes_model(), tiny_batch("llama")
    check_life_of_an_adapter(base, again, batch, randomize, logits_of, tmp_path / "adapter")
    assert {type(m.base_layer).__name__ for m in layers(base)} == {quantised}


def test_4bit_weights_keep_a_layout_that_trains_and_merges(quantized):
    """A stand-in for bitsandbytes' module on a CPU with AVX512-BF16, which few machines have."""

    class RepackedInt8Linear(Int8Linear):
        support_avx512bf16_for_cpu = True
        packed = True

        def _save_to_state_dict(self, *args: Any) -> None:
            self.packed = False
            super()._save_to_state_dict(*args)

    model = quantized()
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.__class__ = RepackedInt8Linear
    get_peft_model(model, config(target_modules=["q_proj"]))
    found = [m for m in model.modules() if isinstance(m, RepackedInt8Linear)]
    assert len(found) == 2 * len(TARGETS)
    assert not any(m.packed or m.support_avx512bf16_for_cpu for m in found)


@needs_bitsandbytes
def test_bitsandbytes_all_linear_and_merge(bitsandbytes_model, tiny_batch, randomize, logits_of):
    fields = {"num_experts": 0, "num_shared_experts": 1, "target_modules": "all-linear"}
    model = randomize(get_peft_model(bitsandbytes_model(), config(**fields)).eval())
    assert len(layers(model)) == 14
    plain = logits_of(model, tiny_batch("llama"), adapter_names=["__base__"] * 2)
    for layer in layers(model):
        layer.molora_experts["default"].B.data *= 0.1
    expected = logits_of(model, tiny_batch("llama"))
    effect = (expected - plain).norm()
    model.merge_adapter()  # rounds to the base's own bits
    assert (logits_of(model, tiny_batch("llama")) - expected).norm() < effect / 3
    model.unmerge_adapter()
    assert (logits_of(model, tiny_batch("llama")) - expected).norm() < effect / 3


@needs_bitsandbytes
@pytest.mark.parametrize("double", [False, True])
def test_a_pass_before_the_adapter_leaves_the_weights_as_they_were(tiny_model, tmp_path, double):
    """Up to bitsandbytes' own rounding of the scales to bf16, on a CPU for which it repacks."""
    tiny_model("llama", hidden_size=128, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double,
    )
    ids, found = torch.arange(3, 20)[None], []
    for before in (False, True):
        model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
        with torch.no_grad():
            if before:
                model(ids)
            keep_4bit_layout(model)
            found.append(model(ids).logits)
    assert (found[1] - found[0]).norm() < 0.03 * found[0].norm()
