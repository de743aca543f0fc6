"""Sites that are whole feed-forward networks: in several architectures, and under PEFT's hands."""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import molora
from molora import MoloraConfig
from molora.describe import describe
from molora.feedforward import FeedForward
from molora.layer import Linear

INSIDE = r"(mlp|DenseReluDense)\.\w+"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
ONE_LAYER = {
    "gpt_neox": "GPTNeoX",
    "mistral": "Mistral",
    "nemotron": "Nemotron",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
}
FAMILIES = ("llama", "qwen3", "gemma", "gpt2", "t5", "vit", *ONE_LAYER)
IDS = torch.tensor([[5, 9, 33, 12], [44, 3, 17, 8], [8, 8, 50, 31]])


def config(**fields: Any) -> MoloraConfig:
    defaults = {
        "mixing": "feed_forward",
        "target_modules": "all-linear",
        "num_experts": {INSIDE: 4, ".*": 0},
        "num_shared_experts": {INSIDE: 0, ".*": 1},
        "r": 2,
    }
    return MoloraConfig(**{**defaults, **fields})


@pytest.fixture(scope="module")
def family(tiny_model):
    def build(name: str) -> Any:
        torch.manual_seed(0)
        if name not in ONE_LAYER:
            return tiny_model(name)
        settings = getattr(transformers, f"{ONE_LAYER[name]}Config")(**SIZES)
        return getattr(transformers, f"{ONE_LAYER[name]}ForCausalLM")(settings).eval()

    return build


def networks(model: Any) -> dict[str, FeedForward]:
    return {
        layer.molora_allocation["default"].site.name: layer
        for layer in model.modules()
        if isinstance(layer, FeedForward)
    }


def with_expert(layer: FeedForward, expert: int, adapter: str = "default") -> nn.Module:
    """A copy of the base network, by its own code, with an expert merged into its weights."""
    network = copy.deepcopy(layer.base_layer)
    for name, experts in layer.molora_experts[adapter].linears.items():
        start = sum(experts.ranks[:expert])
        columns = slice(start, start + experts.ranks[expert])
        delta = experts.scaling[expert] * experts.B[:, columns] @ experts.A[columns]
        linear = getattr(network, name)
        linear.weight.data += delta.T if isinstance(linear, Conv1D) else delta
    return network


@torch.no_grad()
def expected(layer: FeedForward, x: Tensor, adapter: str = "default") -> Tensor:
    """The two likeliest experts' outputs, token by token."""
    probs = (x @ layer.molora_router[adapter].weight.T).softmax(-1)
    chosen = probs.topk(2).indices
    weights = torch.zeros_like(probs).scatter(-1, chosen, probs.gather(-1, chosen))
    weights = weights / weights.sum(-1, keepdim=True)
    outputs = [with_expert(layer, e, adapter)(x) for e in range(probs.shape[-1])]
    return sum(weights[..., e, None] * output for e, output in enumerate(outputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_it_equals_the_mixture_of_copies_with_merged_weights(name: str, family, randomize):
    model = family(name)
    randomize(get_peft_model(model, config()))
    sites = networks(model)
    assert len(sites) == {"t5": 4, **dict.fromkeys(ONE_LAYER, 1)}.get(name, 2)
    generator = torch.Generator().manual_seed(0)
    for layer in sites.values():
        x = torch.randn(2, 5, 32, generator=generator)
        with torch.no_grad():
            actual = layer(x)
        target = expected(layer, x)
        torch.testing.assert_close(actual / target.std(), target / target.std(), atol=2e-5, rtol=0)
        assert not torch.allclose(actual, layer.base_layer(x), atol=0.1)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_dropouts_of_the_network_stay(name: str, tiny_model):
    rates = {"gpt2": {"resid_pdrop": 0.5}, "t5": {"dropout_rate": 0.5}}[name]
    model = tiny_model(name, **rates)
    get_peft_model(model, config())
    layer = next(iter(networks(model).values())).train()
    x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert not torch.allclose(y, layer(x))
    if name == "gpt2":  # on the output, so that half of it is zero
        assert 0.4 < (y == 0).float().mean() < 0.6
    torch.testing.assert_close(layer.eval()(x), layer.base_layer(x))


def test_t5_keeps_its_down_projection_in_fp32(tiny_model):
    model = tiny_model("t5").to(torch.bfloat16)
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.to(torch.float32)
    get_peft_model(model, config())
    layer = networks(model)["encoder.block.0.layer.1.DenseReluDense"]
    x = torch.randn(1, 3, 32, dtype=torch.bfloat16)
    assert layer(x).dtype == layer.base_layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), layer.base_layer(x), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    "name, found",
    [("opt", "OPTDecoderLayer of .*fc1"), ("bert", "BertIntermediate of dense")],
)
def test_a_model_without_networks_is_refused(name: str, found: str, tiny_model):
    base = tiny_model(name)
    before = [module for module, _ in base.named_modules()]
    experts = {"num_experts": 4, "num_shared_experts": 0}
    with pytest.raises(ValueError, match=rf"no linear module.*{found}.*mixing='linear'"):
        get_peft_model(base, config(**experts))
    assert [module for module, _ in base.named_modules()] == before


def test_experts_beside_a_network_are_refused(tiny_model):
    """A network with one more part is none that is known: its experts would mix one by one."""
    base = tiny_model("llama")
    base.model.layers[1].mlp.norm = nn.LayerNorm(32)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp', a LlamaMLP of .*norm"):
        get_peft_model(base, config())
    # Attention isn't part of a network: it may have experts of its own.
    base = tiny_model("llama")
    get_peft_model(base, config(num_experts=4, num_shared_experts=0))
    assert isinstance(base.model.layers[0].self_attn.q_proj, Linear)


class Squared(nn.Module):
    """The parts of a Llama's network, put together otherwise."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = base.gate_proj, base.up_proj
        self.down_proj, self.act_fn = base.down_proj, base.act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) ** 2)


def test_a_network_that_computes_something_else_is_refused(tiny_model):
    base = tiny_model("llama").train()
    base.model.layers[1].mlp = Squared(base.model.layers[1].mlp)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp' \(Squared\) .* isn't"):
        get_peft_model(base, config())
    assert all(module.training for module in base.modules())


def test_unequal_numbers_of_experts_are_refused(tiny_model):
    uneven = {r"mlp\.up_proj": 2, INSIDE: 4, ".*": 0}
    with pytest.raises(ValueError, match=r"gate_proj' and '.*up_proj' have 4 and 2 experts"):
        get_peft_model(tiny_model("llama"), config(num_experts=uneven, top_k=2))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mixing": "ffn"}, "unknown mixing 'ffn'; known: feed_forward, linear"),
        ({"gate": "convex", "num_shared_experts": 1}, "weighs a shared expert"),
        ({"bias": "molora_only"}, "bias='molora_only' doesn't reach"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_a_pattern_that_matches_nothing_is_said(tiny_model):
    fields = {"rank_pattern": {"up_proj": 3, "upp": 4}}
    with pytest.warns(UserWarning, match=r"rank_pattern 'upp' match no target module"):
        model = get_peft_model(tiny_model("llama"), config(**fields))
    ranks = [part.ranks for part in networks(model)["model.layers.0.mlp"].molora_allocation[
        "default"].parts]  # fmt: skip
    assert ranks == [(2,) * 4, (3,) * 4, (2,) * 4]


def test_the_table_names_the_modules(tiny_model):
    model = get_peft_model(tiny_model("llama"), config(rank_pattern={"down_proj": 5}))
    row = next(line for line in describe(model).splitlines() if "mlp" in line)
    assert row.split() == [
        "model.layers.{0-1}.mlp", "4", "gate_proj,up_proj", "4x2;", "down_proj", "4x5", "2", "-",
        "36", "own", f"{2 * (4 * 32 + 4 * 9 * (32 + 48)):,}",
    ]  # fmt: skip


@pytest.fixture
def two(tiny_model, randomize) -> Any:
    """A model with the adapters "default" (active) and "second" on the same networks."""
    model = get_peft_model(tiny_model("llama"), config())
    model.add_adapter("second", config(target_modules=["up_proj", "down_proj"], r=3))
    return randomize(model).eval()


def test_two_adapters_switch_combine_and_go(two, logits_of, tiny_model):
    batch = {"input_ids": IDS}
    layer = networks(two)["model.layers.0.mlp"]
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    one, base = layer(x), layer.base_layer(x)
    two.set_adapter("second")
    other = layer(x)
    torch.testing.assert_close(other, expected(layer, x, "second"), atol=1e-3, rtol=1e-4)
    two.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), one + other - base, atol=1e-3, rtol=1e-4)
    two.base_model.set_adapter("second")
    with two.disable_adapter():
        torch.testing.assert_close(logits_of(two, batch), logits_of(tiny_model("llama"), batch))
    both = logits_of(two, batch)
    two.delete_adapter("default")
    assert torch.equal(logits_of(two, batch), both)
    unloaded = two.unload()
    assert networks(unloaded) == {}
    assert torch.equal(logits_of(unloaded, batch), logits_of(tiny_model("llama"), batch))


def test_a_batch_may_mix_adapters(two, logits_of):
    names = ["second", "__base__", "default"]
    mixed = logits_of(two, {"input_ids": IDS}, adapter_names=names)
    for row, name in enumerate(names):
        one = {"input_ids": IDS[row : row + 1]}
        if name == "__base__":
            with two.disable_adapter():
                alone = logits_of(two, one)
        else:
            two.set_adapter(name)
            alone = logits_of(two, one)
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-4, rtol=1e-4)


def test_merging_is_refused_before_anything_changes(two, tiny_model):
    before = copy.deepcopy(two.state_dict())
    for merge in (two.merge_and_unload, two.merge_adapter):
        with pytest.raises(ValueError, match="whole feed-forward networks at 'model.layers.0.mlp'"):
            merge()
    with pytest.raises(ValueError, match="not even with fixed routing weights"):
        molora.fix_routing(two, torch.full((4,), 0.25))
    with pytest.raises(ValueError, match="whole feed-forward networks"):
        networks(two)["model.layers.0.mlp"].merge()
    assert all(torch.equal(value, before[key]) for key, value in two.state_dict().items())


def test_constant_weights_merge_no_network(tiny_model):
    model = get_peft_model(tiny_model("llama"), config(gate="uniform", router="random"))
    with pytest.raises(ValueError, match="whole feed-forward networks"):
        model.merge_and_unload()


def test_adapters_on_and_inside_a_network_are_refused(tiny_model):
    linear = config(
        mixing="linear", num_experts=2, num_shared_experts=0, target_modules=["up_proj"]
    )
    model = get_peft_model(tiny_model("llama"), config())
    with pytest.raises(ValueError, match=r"both on .*'model\.layers\.0\.mlp' and on .*up_proj"):
        model.add_adapter("inside", linear)
    model = get_peft_model(tiny_model("llama"), linear)
    with pytest.raises(ValueError, match=r"both on .*'model\.layers\.0\.mlp' and on .*up_proj"):
        model.add_adapter("around", config())


def test_an_adapter_loads_into_a_bare_model(two, tiny_model, tmp_path, logits_of):
    two.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second"):
        two.set_adapter(name)
        loaded.set_adapter(name)
        batch = {"input_ids": IDS}
        assert torch.equal(logits_of(loaded, batch), logits_of(two, batch))


def test_the_state_dict_names_the_sites(two, tiny_model):
    weights = peft.get_peft_model_state_dict(two, adapter_name="second")
    stripped = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    settings = config(target_modules=["up_proj", "down_proj"], r=3)
    model = peft.inject_adapter_in_model(settings, tiny_model("llama"), state_dict=stripped)
    layer = networks(model)["model.layers.1.mlp"]
    assert list(layer.molora_experts["default"].linears) == ["up_proj", "down_proj"]


def test_the_parts_of_the_network_can_be_asked_for(two):
    layer = networks(two)["model.layers.0.mlp"]
    assert layer.down_proj is layer.base_layer.down_proj
    with pytest.raises(AttributeError, match="lost"):
        _ = layer.lost


def test_an_activation_that_learns_gets_its_gradient(tiny_model):
    base = tiny_model("llama")
    for layer in base.model.layers:
        layer.mlp.act_fn = nn.PReLU()
    get_peft_model(base, config())
    activation = base.model.layers[0].mlp.act_fn
    activation.requires_grad_(True)
    base(input_ids=IDS).logits.sum().backward()
    assert activation.weight.grad is not None and activation.weight.grad.abs().sum() > 0


def test_a_router_may_read_the_base_networks_output(tiny_model, randomize):
    model = tiny_model("llama")
    randomize(get_peft_model(model, config(router="output")))
    layer = networks(model)["model.layers.0.mlp"]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), molora.observe(model) as records:
        y = layer(x)
    router = layer.molora_router["default"]
    logits = layer.base_layer(x).flatten(0, 1) @ router.weight.T
    torch.testing.assert_close(records["model.layers.0.mlp"].logits, logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(y, layer.base_layer(x), atol=0.1)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_equals_eager(tiny_model, randomize):
    model = tiny_model("llama")
    randomize(get_peft_model(model, config()))
    layer = networks(model)["model.layers.0.mlp"]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-4, rtol=1e-4)
