"""The router that reads the base layer's output."""

import torch
from peft import get_peft_model
from torch import nn

import molora
from molora import MoloraConfig


def test_it_reads_the_output_with_experts_of_any_kind():
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    config = MoloraConfig(
        target_modules=["0"], router="output", gate="dense", num_experts=3, r=2,
        router_options={"temperature": 0.5},
    )  # fmt: skip
    model = get_peft_model(nn.Sequential(base), config)
    router = model.base_model.model[0].molora_router["default"]
    assert router.weight.shape == (3, 5)
    x = torch.randn(2, 4, 6)
    with molora.observe(model) as records:
        model(x).sum().backward()
    expected = (base(x).flatten(0, 1) @ router.weight.T / 0.5).softmax(-1)
    torch.testing.assert_close(records["0"].weights, expected.detach())
