"""Weights that the configuration holds."""

import math
import re

import pytest
import torch
from peft import PeftModel, get_peft_model

from molora import MoloraConfig, SiteInput
from molora.gates import GATES

WEIGHTS = [0.5, -0.25, 0.0]


def build(weights, num_experts=3):
    options = {"weights": weights}
    return GATES.build("fixed", options, num_experts=num_experts, top_k=None, in_features=1)


def test_every_token_gets_them_in_the_dtype_of_the_logits():
    gate = build(WEIGHTS)
    for dtype in (torch.float32, torch.float64):
        routing = gate(torch.randn(4, 3, dtype=dtype), SiteInput(torch.zeros(4, 1)))
        assert routing.weights.dtype == dtype and routing.weights.tolist() == [WEIGHTS] * 4
        torch.testing.assert_close(routing.probs[0], torch.tensor([2 / 3, 1 / 3, 0], dtype=dtype))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (["a"], "weights=['a'] must be a list of finite numbers"),
        ([True, 1.0], "weights=[True, 1.0] must be a list of finite numbers"),
        ([math.nan], "weights=[nan] must be a list of finite numbers"),
        ([math.inf], "weights=[inf] must be a list of finite numbers"),
        (0.5, "weights=0.5 must be a list of finite numbers"),
        ([0, 0.0], "weights=[0, 0.0] are all 0"),
    ],
    ids=str,
)
def test_weights_that_are_none(weights, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        build(weights)


def test_a_number_for_each_expert(tiny_model):
    config = MoloraConfig(
        num_experts=2, target_modules=["up_proj"], router="random", gate="fixed",
        gate_options={"weights": WEIGHTS},
    )  # fmt: skip
    with pytest.raises(ValueError, match="gives 3 weights for 2 experts"):
        get_peft_model(tiny_model("llama"), config)


@pytest.mark.parametrize("weights", [[1.0], [0.5]])
def test_one_expert_is_plain_lora_only_with_weight_1(
    tiny_model, tiny_batch, logits_of, tmp_path, weights
):
    config = MoloraConfig(
        num_experts=1, r=2, target_modules=["up_proj"], router="random", gate="fixed",
        gate_options={"weights": weights}, init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny_model("llama"), config).eval()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.is_routed("default") == (weights != [1.0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    batch = tiny_batch("llama")
    expected = logits_of(loaded, batch)
    assert torch.equal(logits_of(model, batch), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, batch), expected, atol=1e-5, rtol=1e-5)
