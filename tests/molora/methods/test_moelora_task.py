"""MOELoRA from its formula, and the static weights of a task."""

import pytest
import torch
from peft import get_peft_model

from molora import MoloraConfig
from molora.layer import MoloraLayer

from .test_sequence_methods import for_each_token


def formula(site):
    t = site.p["router.embedding"][site.labels["task_ids"]]
    w = (t @ site.p["router.weight"].T).softmax(-1)
    y = site.base()
    for e, (a, b) in enumerate(zip(*site.experts(), strict=True)):
        y = y + 2 * for_each_token(site, w)[:, e, None] * (site.x @ a.T @ b.T)
    return y


def test_formula(fidelity):
    options = {"num_tasks": 3, "embedding_size": 4}
    fields = {"router_options": options, "lora_dropout": 0.0}
    case = fidelity(MoloraConfig.from_method("moelora-task", **fields))
    case.check(formula)
    assert case.layers()["layers.0.o_proj"].molora_experts["default"].ranks == (2,) * 8


def routed(model) -> list[MoloraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, MoloraLayer)]


@pytest.mark.parametrize("trains", [False, True])
def test_the_adapter_of_a_task_is_static(trains: bool, tiny_model, randomize, logits_of):
    config = MoloraConfig.from_method("moelora-task", router_options={"num_tasks": 3})
    model = randomize(get_peft_model(tiny_model("llama"), config)).train(trains)
    ids = torch.tensor([[5, 9, 33, 12]])
    for task in range(3):
        model.eval()
        expected = logits_of(model, {"input_ids": ids, "routing_task_ids": torch.tensor([task])})
        model.train(trains)
        merged = tiny_model("llama")
        for layer in routed(model):
            router, gate = layer.molora_router["default"], layer.molora_gate["default"]
            weights = router.static_weights(gate, task)
            assert gate.training is trains and weights.shape == (8,)
            site = layer.molora_allocation["default"].site.name
            delta = layer.molora_experts["default"].delta_weight(weights)
            merged.get_submodule(site).weight.data += delta
        torch.testing.assert_close(
            logits_of(merged, {"input_ids": ids}), expected, atol=1e-4, rtol=1e-4
        )
    for task in (3, -1, 1.5, True, "1"):
        with pytest.raises(ValueError, match=f"no task {task!r}: this router knows 3"):
            router.static_weights(gate, task)


def test_an_unknown_task(tiny_model):
    config = MoloraConfig.from_method("moelora-task", router_options={"num_tasks": 3})
    model = get_peft_model(tiny_model("llama"), config)
    for task in (-1, 3):
        with pytest.raises(ValueError, match=f"no task {task}: .*num_tasks"):
            model(torch.tensor([[5]]), routing_task_ids=torch.tensor([task]))


def test_what_reads_more_than_the_task_has_no_static_weights(tiny_model):
    model = get_peft_model(tiny_model("llama"), MoloraConfig.from_method("mola", num_experts=2))
    layer = routed(model)[0]
    router, gate = layer.molora_router["default"], layer.molora_gate["default"]
    assert router.static_weights(gate, 0) is None


def test_wrong_options():
    for option in ("num_tasks", "embedding_size"):
        with pytest.raises(ValueError, match=f"{option}=0 must be at least 1"):
            MoloraConfig.from_method("moelora-task", router_options={option: 0})
