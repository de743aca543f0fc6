"""MoA from its formula: one decision for a layer, each module taking its own weight."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

from molora import MoloraConfig

MODULES = ["o_proj", "gate_proj", "up_proj", "down_proj"]


def config(name: str, **fields) -> MoloraConfig:
    options = {"modules": MODULES, "adapter": "down_proj", "adapter_size": 3}
    settings = {"target_modules": MODULES, "num_experts": 5, "r": 2, "expert_options": options}
    return MoloraConfig.from_method(name, **{**settings, "lora_alpha": 3, **fields})


def decision(site, threshold: float):
    if "router.weight_1" in site.p:  # the first site of a layer decides for it
        one, two, three = (
            (site.p[f"router.weight_{i}"], site.p[f"router.bias_{i}"]) for i in (1, 2, 3)
        )
        inner = F.silu(F.linear(site.x, *one)) * F.linear(site.x, *three)
        w = torch.sigmoid(F.linear(inner, *two))
        site.memory[site.layer] = torch.where(w >= threshold, w, 0)
    return site.memory[site.layer]


@pytest.mark.parametrize(("name", "threshold"), [("moa", 0.0), ("moa-sparse", 0.45)])
def test_formula(fidelity, name: str, threshold: float):
    kept = []

    def formula(site):
        w, module = decision(site, threshold), site.name.rpartition(".")[2]
        kept.append((w > 0).double().mean())
        own = w[:, MODULES.index(module), None]
        y = site.base() + own * 1.5 * (site.x @ site.p["experts.A"].T @ site.p["experts.B"].T)
        if module == "down_proj":
            inner = F.silu(F.linear(site.x, site.p["experts.D"], site.p["experts.d"]))
            y = y + w[:, 4, None] * F.linear(inner, site.p["experts.U"], site.p["experts.u"])
        return y

    fields = {"gate_options": {"threshold": threshold}} if threshold else {}
    fidelity(config(name, **fields)).check(formula)
    assert all(0.1 < share < 0.9 for share in kept) if threshold else min(kept) == 1


def test_a_site_has_the_parameters_of_its_own_expert_alone(tiny_model):
    model = get_peft_model(tiny_model("llama"), MoloraConfig.from_method("moa"))
    layer = model.base_model.model.model.layers[0]
    query = layer.self_attn.q_proj.molora_experts["default"]
    assert {name for name, _ in query.named_parameters()} == {"A", "B"}
    assert query.A.shape == (8, 32)
    down = layer.mlp.down_proj.molora_experts["default"]
    assert down.D.shape == (16, 48) and down.U.shape == (32, 16)
    assert [n for n, m in model.named_modules() if n.endswith("molora_router.default")] == [
        f"base_model.model.model.layers.{i}.self_attn.q_proj.molora_router.default" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 4}, "set num_experts=5 instead of 4"),
        ({"expert_options": {"modules": ["a", "a"]}}, "the names must differ"),
        ({"expert_options": {"modules": MODULES, "adapter": "x"}}, "the adapter's be one of them"),
        (
            {"expert_options": {"modules": MODULES, "adapter": "o_proj", "adapter_size": 0}},
            "adapter_size=0 must be at least 1",
        ),
        ({"router_options": {"expansion": 0}}, "expansion=0 must be at least 1"),
        ({"gate": "independent_threshold", "gate_options": {"threshold": 1}}, "threshold=1 must"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config("moa", **fields)


def test_a_module_without_an_expert_is_refused(tiny_model):
    wrong = MoloraConfig.from_method("moa", target_modules=["q_proj", "up_proj"])
    with pytest.raises(ValueError, match="the module 'up_proj' has no expert among"):
        get_peft_model(tiny_model("llama"), wrong)
