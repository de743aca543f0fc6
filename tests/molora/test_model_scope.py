"""One decision for all modules of a model (router_scope="model")."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import molora
from molora import MoloraConfig
from molora.layer import MoloraLayer

from .test_contract import saved_whole

BATCH = {
    "input_ids": torch.tensor([[5, 9, 33, 12], [44, 3, 17, 8]]),
    "labels": torch.tensor([[-100, -100, 33, 12], [-100, -100, -100, 8]]),
    "routing_task_ids": torch.tensor([1, 0]),
}

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]


@pytest.fixture
def build(tiny_model, randomize):
    """`build(router)`: a tiny Llama whose modules all follow one such router."""

    def make(router: str, **fields: Any) -> Any:
        config = MoloraConfig(
            router=router, r=2, num_experts=3, target_modules=TARGETS,
            **{"gate": "dense", "router_scope": "model", **fields},
        )  # fmt: skip
        return randomize(get_peft_model(tiny_model("llama"), config).eval())

    return make


def layers(model: Any) -> list[MoloraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, MoloraLayer)]


every_router = pytest.mark.parametrize("router", ["instruction", "task_embedding"])


@every_router
def test_all_modules_follow_one_router(router: str, build):
    model = build(router)
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, molora.Router):
            module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), molora.observe(model) as records:
        model(**BATCH)
    assert len(calls) == 1  # for the model
    first, *others = records.values()
    assert len(others) == 11 and all(torch.equal(first.weights, o.weights) for o in others)
    holders = [layer for layer in layers(model) if "default" in layer.molora_router]
    assert [layer.molora_allocation["default"].site.name for layer in holders] == [
        "model.layers.0.self_attn.q_proj"
    ]
    assert "q_proj" in molora.describe(model)


@every_router
def test_the_router_gets_the_gradient_of_all_modules(router: str, build):
    """That of 12 routers with equal parameters, added up."""
    model, apart = build(router), build(router, router_scope="site")
    shared = {k: v for k, v in model.named_parameters() if "molora_router" in k}
    for key, value in apart.named_parameters():
        if "molora_router" in key:
            (source,) = (v for k, v in shared.items() if k.split(".")[-1] == key.split(".")[-1])
            value.data.copy_(source)
        else:
            value.data.copy_(model.get_parameter(key))
    for built in (model, apart):
        built(**BATCH).loss.backward()
    for key, value in shared.items():
        name = key.split(".")[-1]
        parts = [v.grad for k, v in apart.named_parameters() if "router" in k and k.endswith(name)]
        assert len(parts) == 12
        torch.testing.assert_close(value.grad, sum(parts), atol=1e-6, rtol=1e-5)


@every_router
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_whole])
def test_a_copy_follows_its_own_router(router: str, build, logits_of, duplicate):
    model = build(router)
    expected = logits_of(model, BATCH)
    model(**BATCH).loss.backward()  # what a pass leaves must be possible to copy
    twin = duplicate(model)
    assert torch.equal(logits_of(twin, BATCH), expected)
    for name, parameter in model.named_parameters():
        if "molora_router" in name:
            parameter.data.zero_()
    assert not torch.equal(logits_of(model, BATCH), expected)
    assert torch.equal(logits_of(twin, BATCH), expected)


def test_each_adapter_has_its_own(build, logits_of):
    model = build("task_embedding")
    expected = logits_of(model, BATCH)
    other = MoloraConfig(
        router="instruction", router_scope="model", num_experts=2, target_modules=["q_proj"]
    )
    model.add_adapter("other", other)
    assert torch.equal(logits_of(model, BATCH), expected)
    model.set_adapter("other")
    with torch.no_grad(), molora.observe(model) as records:
        model(**BATCH)
    assert [routing.num_experts for routing in records.values()] == [2, 2]
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits_of(model, BATCH), expected)


def test_losses_are_those_of_one_decision(build, tiny_batch):
    def penalty(scope: str) -> Tensor:
        losses = {"z_loss": 1.0}
        model = build("instruction", router_scope=scope, losses=losses)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        routers = [layer.molora_router["default"] for layer in layers(model) if layer.molora_router]
        for router in routers:
            router.weight.data.copy_(routers[0].weight)
            router.weight.requires_grad_()
        model.train()(**BATCH).loss.backward()
        with_loss = sum(router.weight.grad for router in routers)
        model.eval().zero_grad()
        model(**BATCH).loss.backward()
        return with_loss - sum(router.weight.grad for router in routers)

    torch.testing.assert_close(penalty("model"), penalty("site"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"router": "linear"}, "router='linear' reads its own module's input;"),
        ({"router": "prompt_mean"}, "router='prompt_mean' reads its own module's input;"),
        ({"router_options": {"noise": 0.1}}, "option noise=0.1 draws anew at each;"),
        ({"gate": "gshard"}, "gate='gshard' draws anew at each;"),
        ({"gate": "expert_dropout"}, "gate='expert_dropout' draws anew at each;"),
    ],
    ids=str,
)
def test_what_can_not_decide_for_all_modules_is_refused(fields, fault):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        MoloraConfig(**{"router": "instruction", "router_scope": "model", **fields})
    assert fault in str(caught.value)
