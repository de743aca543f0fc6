"""Merging adapters that don't depend on the input, undoing it, and refusing the others."""

from typing import Any

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import molora
from molora import MoloraConfig, register_router
from molora.routers import TaskRouter

LORA = {"num_experts": 0, "num_shared_experts": 1, "init_lora_weights": False, "r": 3}
UNROUTED = {
    "one shared": {},
    "several shared": {"num_shared_experts": 3},
    "one expert": {"num_experts": 1, "num_shared_experts": 0},
    "one and shared": {"num_experts": 1, "num_shared_experts": 2, "shared_expert_rank": 5},
    "rsLoRA": {"use_rslora": True},
}
every_unrouted = pytest.mark.parametrize("fields", UNROUTED.values(), ids=UNROUTED)


class Base(nn.Module):
    """A linear module and a Conv1D, whose weight is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = Conv1D(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(dtype: torch.dtype = torch.float64, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    base = Base().to(dtype)
    nn.init.normal_(base.down.weight, std=0.5)
    config = MoloraConfig(target_modules=["up", "down"], **{**LORA, **fields})
    return get_peft_model(base, config, autocast_adapter_dtype=False).to(dtype)


def weights(model: PeftModel) -> list[Tensor]:
    base = model.base_model.model
    return [layer.get_base_layer().weight.detach().clone() for layer in (base.up, base.down)]


def delta(layer: nn.Module, name: str = "default") -> Tensor:
    """(d_out, d_in) sum over experts of scaling B A."""
    experts, start, total = layer.molora_experts[name], 0, 0.0
    ranks = experts.ranks + experts.shared_ranks
    for rank, scaling in zip(ranks, experts.scaling, strict=True):
        columns = slice(start, start + rank)
        total = total + scaling * experts.B[:, columns] @ experts.A[columns]
        start += rank
    return total.detach()


@every_unrouted
def test_the_merged_weight_is_the_base_plus_the_experts(fields):
    model = adapted(**fields)
    base = model.base_model.model
    before = weights(model)
    model.merge_adapter()
    up, down = weights(model)
    torch.testing.assert_close(up, before[0] + delta(base.up), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(down, before[1] + delta(base.down).T, rtol=1e-12, atol=1e-12)


@every_unrouted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merging_changes_no_output_and_unmerging_restores_the_weight_to_the_bit(fields, dtype):
    model = adapted(dtype, **fields)
    x = torch.randn(5, 6, dtype=dtype)
    expected, before = model(x), weights(model)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    assert not torch.equal(weights(model)[0], before[0])
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert torch.equal(model(x), expected)


def test_merge_and_unload_gives_the_plain_model_with_the_same_output():
    model = adapted()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = model(x)
    merged = model.merge_and_unload()
    assert type(merged.up) is nn.Linear and type(merged.down) is Conv1D
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)


def test_unload_gives_the_base_model_back():
    model = adapted()
    x = torch.randn(5, 6, dtype=torch.float64)
    with model.disable_adapter():
        expected = model(x)
    plain = model.unload()
    assert type(plain.up) is nn.Linear
    assert torch.equal(plain(x), expected)


def test_several_adapters_merge_and_are_undone_together():
    model = adapted()
    config = MoloraConfig(target_modules=["up"], **LORA)
    model.add_adapter("second", config)
    model.base_model.model.double()
    before, up = weights(model), model.base_model.model.up
    model.merge_adapter(["default", "second"])
    expected = before[0] + delta(up) + delta(up, "second")
    torch.testing.assert_close(weights(model)[0], expected, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_a_disabled_adapter_is_taken_out_of_the_weight():
    model = adapted()
    x, before = torch.randn(5, 6, dtype=torch.float64), weights(model)
    model.merge_adapter()
    with model.disable_adapter():
        model(x)
        assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_in_bf16_the_sum_is_formed_in_fp32_and_rounded_once():
    model = adapted(torch.bfloat16)
    up, before = model.base_model.model.up, weights(model)[0]
    experts = up.molora_experts["default"]
    product = experts.B.detach().float() @ experts.A.detach().float()
    model.merge_adapter()
    expected = (before.float() + experts.scaling[0] * product).bfloat16()
    assert torch.equal(weights(model)[0], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_a_weight_that_is_not_finite(bad):
    model = adapted()
    before = weights(model)
    with torch.no_grad():
        model.base_model.model.up.molora_experts["default"].B[0, 0] = bad
    with pytest.raises(ValueError, match="'default' gives a weight that is not finite"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_a_weight_that_is_also_the_embeddings_is_not_merged(how, tiny_model, logits_of, tiny_batch):
    config = MoloraConfig(target_modules=["lm_head"], **LORA)
    model = get_peft_model(tiny_model("llama", tie_word_embeddings=True), config)
    expected = logits_of(model, tiny_batch("llama"))
    with pytest.raises(ValueError, match=r"'lm_head' is that of 'model.embed_tokens' too"):
        getattr(model, how)()
    assert torch.equal(logits_of(model, tiny_batch("llama")), expected)


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_trained_tokens_are_unloaded_with_the_adapter(how, tiny_model, logits_of, tiny_batch):
    config = MoloraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 33], **LORA)
    base, batch = tiny_model("llama"), tiny_batch("llama")
    batch["input_ids"][0, :2] = torch.tensor([5, 33])
    before = logits_of(base, batch)
    model = get_peft_model(base, config)
    tokens = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta
    tokens["default"].data += 0.5
    adapted = logits_of(model, batch)
    assert (adapted - before).abs().max() > 1e-3
    plain = getattr(model, how)()
    assert type(plain.model.embed_tokens) is nn.Embedding
    expected = before if how == "unload" else adapted
    torch.testing.assert_close(logits_of(plain, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["top_k", "dense", "switch", "top_p"])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_routed_experts_are_not_merged_and_the_ways_out_are_named(gate, how):
    model = adapted(num_experts=4, gate=gate)
    x, before = torch.randn(5, 6, dtype=torch.float64), weights(model)
    expected = model(x)
    with pytest.raises(ValueError) as caught:
        getattr(model, how)()
    message = str(caught.value)
    for part in ("'default' routes its experts by token", "save_pretrained", "unload()"):
        assert part in message
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert torch.equal(model(x), expected)


def test_one_routed_site_is_enough_to_refuse():
    model = adapted(num_experts={"up": 2, "down": 1}, num_shared_experts=0)
    with pytest.raises(ValueError, match="by token"):
        model.merge_adapter()
    layer = model.base_model.model
    assert layer.down.get_delta_weight("default").shape == layer.down.get_base_layer().weight.shape
    with pytest.raises(ValueError, match=r"routes the experts of 'up' by token"):
        layer.up.get_delta_weight("default")


def routed(fields: dict[str, Any]) -> PeftModel:
    """A routed adapter, every parameter of it random."""
    model = adapted(**{"num_experts": 3, "num_shared_experts": 1, "lora_dropout": 0.0, **fields})
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


@pytest.mark.parametrize(
    "fields",
    [
        {"gate": "uniform", "router": "random"},
        {"gate": "stochastic", "router": "random"},
        {"gate": "uniform", "router": "random", "rank_wise": True, "num_shared_experts": 0},
    ],
    ids=["uniform", "stochastic", "rank-wise"],
)
def test_a_constant_gate_merges_exactly_without_being_asked(fields):
    model = routed(fields)
    x, before = torch.randn(5, 6, dtype=torch.float64), weights(model)
    expected = model(x)
    model.merge_adapter(safe_merge=True)
    assert not torch.equal(weights(model)[0], before[0])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-12, atol=1e-12)


def mixed_by_hand(model: PeftModel, x: Tensor, fixed: dict[str, list[float]]) -> Tensor:
    """The model with these weights for every token, from the factors."""
    base = model.base_model.model

    def site(layer: Any, weight: Tensor, bias: Tensor, x: Tensor, w: list[float]) -> Tensor:
        experts, y, start = layer.molora_experts["default"], x @ weight + bias, 0
        ranks = experts.ranks + experts.shared_ranks
        for e, rank in enumerate(ranks):
            columns = slice(start, start + rank)
            weighted = experts.scaling[e] * (w[e] if e < len(w) else 1.0)
            y = y + weighted * (x @ experts.A[columns].T @ experts.B[:, columns].T)
            start += rank
        return y

    up, down = base.up.get_base_layer(), base.down.get_base_layer()
    hidden = torch.tanh(site(base.up, up.weight.T, up.bias, x, fixed["up"]))
    return site(base.down, down.weight, down.bias, hidden, fixed["down"])


@pytest.mark.parametrize("how", ["one for all", "each its own", "with the shared expert"])
def test_given_weights_are_merged_with_a_warning_and_computed_with(how):
    model = routed({"top_k": 2})
    one = [0.25, 0.0, -0.75] + ([0.5] if how == "with the shared expert" else [])
    fixed = {"up": one, "down": one if how != "each its own" else [1.0, 2.0, 3.0]}
    x, before = torch.randn(5, 6, dtype=torch.float64), weights(model)
    dynamic, expected = model(x), mixed_by_hand(model, x, fixed)
    molora.fix_routing(model, one if how == "one for all" else fixed)
    assert torch.equal(model(x), dynamic)
    close = {"rtol": 1e-12, "atol": 1e-12}
    with molora.static_routing(model):
        torch.testing.assert_close(model(x), expected, **close)
    assert torch.equal(model(x), dynamic)
    with pytest.warns(UserWarning, match="an approximation of the routing: given routing weights"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), expected, **close)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert torch.equal(model(x), dynamic)
    with pytest.warns(UserWarning, match="approximation"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, **close)


@register_router("merged_by_task")
class ByTask(TaskRouter):
    """A row of logits for each task."""

    def __init__(self, in_features: int, num_experts: int, *, num_tasks: int = 2) -> None:
        super().__init__(in_features, num_experts, num_tasks=num_tasks)
        self.table = nn.Parameter(torch.empty(num_tasks, num_experts))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table)

    def task_logits(self, task_ids: Tensor) -> Tensor:
        return self.table[task_ids]


def test_a_task_is_merged_exactly_when_it_is_named():
    model = routed({"router": "merged_by_task", "gate": "dense"})
    x, before = torch.randn(5, 6, dtype=torch.float64), weights(model)
    with pytest.raises(ValueError, match=r"by token.*molora.fix_routing"):
        model.merge_and_unload()
    base = model.base_model.model
    for task in (1, 0):
        own = {
            name: getattr(base, name).molora_router["default"].table[task].softmax(-1).tolist()
            for name in ("up", "down")
        }
        molora.fix_routing(model, task=task)
        expected = mixed_by_hand(model, x, own)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        model.unmerge_adapter()
        assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    with pytest.raises(ValueError, match="there is no task 2"):
        molora.fix_routing(model, task=2)


@pytest.mark.parametrize("router", ["merged_by_task", "random"])
def test_a_site_that_follows_another_is_merged_by_that_ones_weights(router):
    fields = {"router": router, "gate": "dense" if router == "merged_by_task" else "uniform"}
    torch.manual_seed(0)
    config = MoloraConfig(
        target_modules=["up", "down"], num_experts=3, router_scope="layer", r={"up": 2, "down": 4},
        init_lora_weights=False, **fields,
    )  # fmt: skip
    model = get_peft_model(nn.Sequential(Base()), config).double()
    up, down = model.base_model.model[0].up, model.base_model.model[0].down
    assert "default" in up.molora_router and "default" not in down.molora_router
    expected = torch.full((3,), 1 / 3, dtype=torch.float64)
    if router == "merged_by_task":
        molora.fix_routing(model, task=1)
        expected = up.molora_router["default"].table[1].softmax(-1)
    for layer in (up, down):
        torch.testing.assert_close(layer.static_mixture("default").weights, expected)


def test_a_task_fixes_nothing_where_the_router_reads_the_token():
    model = routed({})
    with pytest.raises(ValueError, match="task=1 doesn't fix the routing weights of 'up'"):
        molora.fix_routing(model, task=1)
    for neither in ({}, {"weights": [1.0] * 3, "task": 1}):
        with pytest.raises(ValueError, match="either weights, a task or a prompt"):
            molora.fix_routing(model, **neither)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, 0.0], r"of 'up' must be 3 or 4 finite numbers, not \[1.0, 0.0\]"),
        ([1.0, 0.0, float("nan")], "must be 3 or 4 finite numbers"),
        ({"up": [1.0, 0.0, 0.0]}, "'down' is missing"),
        ({"up": [1.0] * 3, "down": [1.0] * 3, "left": [1.0]}, "'left' is not one"),
    ],
)
def test_wrong_weights_are_refused_before_anything_is_set(given, message):
    model = routed({})
    with pytest.raises(ValueError, match=message):
        molora.fix_routing(model, given)
    assert not model.base_model.model.up.molora_static


def test_weights_can_not_change_under_a_merged_adapter_and_need_something_routed():
    model = routed({})
    molora.fix_routing(model, [0.0, 1.0, 0.0])
    with pytest.warns(UserWarning, match="approximation"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged; unmerge it first"):
        molora.fix_routing(model, [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="'default' routes nothing; it merges as it is"):
        molora.fix_routing(adapted(), [1.0])
    with pytest.raises(ValueError, match="no MoLoRA adapter named 'other'"):
        molora.fix_routing(adapted(), [1.0], adapter_name="other")


def test_only_the_adapters_that_are_merged_must_be_mergeable():
    model = routed({})
    model.add_adapter("plain", MoloraConfig(target_modules=["up"], **LORA))
    before = weights(model)
    with pytest.raises(ValueError, match="'default' routes its experts by token"):
        model.merge_adapter(["plain", "default"])
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    model.merge_adapter(["plain"])
    assert model.base_model.model.up.merged_adapters == ["plain"]


def test_peft_converts_what_is_static_to_lora():
    model = routed({"gate": "uniform", "router": "random", "r": 1})
    up = model.base_model.model.up
    config, state = convert_to_lora(model, rank=4)
    A, B = (state[f"base_model.model.up.lora_{factor}.weight"] for factor in "AB")
    expected = up.get_delta_weight("default").float()
    assert config.r == config.lora_alpha == 4
    torch.testing.assert_close((B @ A).float(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(routed({}), rank=4)


def test_a_deleted_adapter_takes_its_static_mixture_with_it():
    model = routed({})
    molora.fix_routing(model, [0.0, 1.0, 0.0])
    up = model.base_model.model.up
    model.delete_adapter("default")
    assert not up.molora_static
