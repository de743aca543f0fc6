"""MoV from its formula: vectors that scale the output, chosen by it."""

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn

from molora import MoloraConfig


def formula(site):
    u = site.base()
    p = (u @ site.p["router.weight"].T).softmax(-1)
    factor = sum(p[:, e, None] * (1 + v) for e, v in enumerate(site.p["experts.vectors"]))
    return u * factor


TARGETS = ["o_proj", "up_proj"]  # the first has a bias, which is scaled too


def test_formula(fidelity):
    config = MoloraConfig.from_method("mov", target_modules=TARGETS, num_experts=[3, 5])
    fidelity(config).check(formula)


def test_one_vector_is_ia3(tiny_model, tiny_batch, logits_of):
    """PEFT's IA3 of modules that aren't feed-forward scales the output, bias included."""
    targets = ["q_proj", "fc1"]
    config = MoloraConfig.from_method("mov", target_modules=targets, num_experts=1)
    ours = get_peft_model(tiny_model("opt"), config).eval()
    theirs = get_peft_model(
        tiny_model("opt"), IA3Config(target_modules=targets, feedforward_modules=[])
    ).eval()
    torch.manual_seed(0)
    for name, layer in theirs.named_modules():
        if hasattr(layer, "ia3_l"):
            vector = torch.randn(layer.out_features)
            layer.ia3_l["default"].data.copy_(1 + vector[:, None])
            ours.get_submodule(name).molora_experts["default"].vectors.data.copy_(vector[None])
    batch = tiny_batch("llama")
    expected = logits_of(theirs, batch)
    torch.testing.assert_close(logits_of(ours, batch), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="ScalingVectorExperts can't be written as LoRA factors"):
        ours.merge_and_unload()


def test_what_vectors_would_ignore_is_refused():
    for fields, message in (
        ({"r": 4}, r"vectors, of no rank; set r=1 instead of the ranks \[4, 4\]"),
        ({"lora_dropout": 0.1}, "set lora_dropout=0 instead of 0.1"),
    ):
        model = nn.Sequential(nn.Linear(4, 4))
        settings = {"target_modules": ["0"], "num_experts": 2, **fields}
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, MoloraConfig.from_method("mov", **settings))
        assert type(model[0]) is nn.Linear  # refused before anything was changed
