"""MoLA from its formula, and the four shapes of the paper."""

import pytest
import torch
from peft import get_peft_model

from molora import MoloraConfig
from molora.layer import MoloraLayer

SHAPES = {
    "inverted_triangle:2-8/4": [2, 4, 6, 8],
    "triangle:2-8/4": [8, 6, 4, 2],
    "hourglass:2-8/4": [8, 2, 2, 8],
    "uniform:5": [5, 5, 5, 5],
}


def formula(site):
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    weights = torch.zeros_like(probs)
    for t, row in enumerate(probs):
        chosen = row.topk(2).indices
        weights[t, chosen] = row[chosen] / row[chosen].sum()
    used = (weights > 0).double()
    share = site.token_mean(used) / 2
    balance = probs.shape[1] * (share * site.token_mean(probs)).sum()
    return site.mix(weights), {"load_balancing": balance}


def test_formula(fidelity):
    config = MoloraConfig.from_method(
        "mola",
        num_experts=[3, 5],
        r=[2, 3],
        lora_dropout=0.0,
        losses={"load_balancing": 0.7},
    )
    fidelity(config).check(formula)


@pytest.mark.parametrize("shape", SHAPES)
def test_published_shapes(shape: str, tiny_model):
    config = MoloraConfig.from_method("mola", num_experts=shape, target_modules=["up_proj"])
    model = get_peft_model(tiny_model("llama", num_hidden_layers=4), config)
    experts = [
        len(layer.molora_allocation["default"].ranks)
        for layer in model.modules()
        if isinstance(layer, MoloraLayer)
    ]
    assert experts == SHAPES[shape]
