"""Merging adapters that don't depend on the input, undoing it, and refusing the others."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora import MoloraConfig

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
