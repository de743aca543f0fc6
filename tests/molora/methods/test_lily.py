"""Lily from its formula: one bank of up factors for all layers."""

import pytest
import torch
from peft import get_peft_model

from molora import MoloraConfig
from molora.experts import EXPERTS, SiteSpec


def formula(site):
    held = site.memory.setdefault("held", {})
    module = site.name.rpartition(".")[2]
    for name in ("down", "bank"):  # the first that has it holds it for those after it
        if f"experts.{name}.weight" in site.p:
            held[module, name] = site.p[f"experts.{name}.weight"]
    h = site.x @ held[module, "down"].T
    p = (h @ site.p["router.weight"].T).softmax(-1)
    y = site.base()
    for e, B in enumerate(held[module, "bank"].split(site.ranks, 1)):
        y = y + site.scaling[e] * p[:, e, None] * (h @ B.T)
    return y


@pytest.mark.parametrize("stride", [1, 2])
def test_formula(fidelity, stride: int):
    config = MoloraConfig.from_method(
        "lily", num_experts=3, r=2, lora_alpha=1.5, expert_options={"stride": stride}
    )
    case = fidelity(config)
    names = [key for site in case.layers() for key in case.tensors(site)]
    assert names.count("experts.bank.weight") == 4
    assert names.count("experts.down.weight") == 8 // stride
    case.check(formula)


def test_one_up_factor_needs_no_router(tiny_model, tiny_batch, logits_of, randomize):
    config = MoloraConfig.from_method("lily", num_experts=1, r=2)
    model = randomize(get_peft_model(tiny_model("llama"), config)).eval()
    expected = logits_of(model, tiny_batch("llama"))
    merged = model.merge_and_unload()
    torch.testing.assert_close(
        logits_of(merged, tiny_batch("llama")), expected, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_options": {"stride": 0}}, "stride=0 must be at least 1"),
        ({"num_shared_experts": 1}, r"no shared experts, not the ranks \[32, 32\] and \[32\]"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_model, fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_model("llama"), MoloraConfig.from_method("lily", **fields))


def test_its_router_needs_one_down_factor():
    experts = EXPERTS.build("lora", {}, spec=SiteSpec(4, 4, (2, 2), (), (1.0, 1.0)))
    with pytest.raises(ValueError, match="LoraExperts share no down factor"):
        experts.shared_down_factor()
