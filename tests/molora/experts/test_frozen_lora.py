"""Experts of which some are frozen: equal to LoRA experts, but for who learns."""

import pytest
import torch
from peft import get_peft_model

from molora import MoloraConfig
from molora.experts import EXPERTS, SiteSpec

SPEC = SiteSpec(5, 4, (2, 1, 3), (2,), (1.0, 2.0, 0.5, 1.5))


def build(name: str, **options):
    return EXPERTS.build(name, options, spec=SPEC).double()


def pair(frozen: int | None):
    """Frozen experts and plain ones with the same factors."""
    ours, plain = build("frozen_lora", frozen=frozen), build("lora")
    torch.manual_seed(0)
    for factor, dim in (("A", 0), ("B", 1)):
        whole = torch.randn_like(getattr(plain, factor))
        getattr(plain, factor).data = whole
        first, rest = whole.split([frozen or 0, 8 - (frozen or 0)], dim)
        getattr(ours, factor).data = rest.clone()
        if frozen is not None:
            getattr(ours, f"frozen_{factor}").data = first.clone()
    return ours, plain


@pytest.mark.parametrize("frozen", [None, 2, 3, 6])
def test_they_compute_what_lora_experts_do(frozen):
    ours, plain = pair(frozen)
    x, weights = torch.randn(7, 5).double(), torch.rand(7, 3).double()
    base = torch.zeros(7, 4).double()
    torch.testing.assert_close(ours(x, weights, base), plain(x, weights, base))
    torch.testing.assert_close(ours.outputs(x), plain.outputs(x))
    torch.testing.assert_close(ours.delta_weight(weights[0]), plain.delta_weight(weights[0]))
    torch.testing.assert_close(ours.down_factor(), plain.down_factor())


@pytest.mark.parametrize("frozen", [2, 3, 6])
def test_the_gradient_of_the_others_is_that_of_lora_experts(frozen):
    ours, plain = pair(frozen)
    x, weights = torch.randn(7, 5).double(), torch.rand(7, 3).double()
    for experts in (ours, plain):
        experts(x, weights, torch.zeros(7, 4).double()).square().sum().backward()
    torch.testing.assert_close(ours.A.grad, plain.A.grad[frozen:])
    torch.testing.assert_close(ours.B.grad, plain.B.grad[:, frozen:])


@pytest.mark.parametrize("frozen", [0, 1, 4, 8, -2])
def test_a_number_that_cuts_an_expert_or_leaves_none(frozen):
    with pytest.raises(ValueError, match=rf"frozen={frozen} must be .* end at \[2, 3, 6\]"):
        build("frozen_lora", frozen=frozen)


@pytest.mark.parametrize("frozen", [None, 4])
@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_peft_does_not_wake_them(tiny_model, frozen, init):
    config = MoloraConfig(
        num_experts=3, r=2, top_k=2, target_modules=["up_proj"], experts="frozen_lora",
        expert_options={"frozen": frozen}, init_lora_weights=init,
    )  # fmt: skip
    model = get_peft_model(tiny_model("llama"), config)
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.set_adapter("default")
    awake = {
        name.rpartition(".")[2]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "molora_experts" in name
    }
    assert awake == (set() if frozen is None else {"A", "B"})
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert (layer.molora_experts["default"].factors()[1].abs().sum() == 0) == (init is not False)
