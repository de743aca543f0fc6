"""Routing weights of one prompt held fixed: the adapter as one map, exact for what starts so."""

import re
from typing import Any

import pytest
import torch
from peft import convert_to_lora, get_peft_model

import molora
from molora import MoloraConfig

PROMPT, ANSWER = [5, 9, 33, 12, 60], [7, 21, 44]
METHODS = ("octavius", "smear", "meo", "milora")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def routed(model: Any, prompt: list[int] = PROMPT) -> torch.Tensor:
    ids = torch.tensor([prompt + ANSWER])
    return model(ids, prompt_mask=torch.arange(ids.shape[1])[None] < len(prompt)).logits


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_what_starts_with_the_prompt_is_merged_exactly(method: str, build_by_prompt, recwarn):
    model = build_by_prompt(method)
    expected, ids = routed(model), torch.tensor([PROMPT + ANSWER])
    molora.fix_routing(model, prompt=torch.tensor([PROMPT]))
    with molora.static_routing(model):
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(routed(model), expected)  # the forward goes on routing
    assert not [w for w in recwarn if "approximation" in str(w.message)]
    other = [8, 50, 31, 29, 3]
    expected = routed(model, other)
    with molora.static_routing(model):  # and the first prompt's weights are another map
        assert (model(torch.tensor([other + ANSWER])).logits - expected).abs().max() > 1e-2
    merged = model.merge_and_unload()
    torch.testing.assert_close(
        merged(ids).logits[:, 1:], routed(build_by_prompt(method))[:, 1:], **CLOSE
    )


@torch.no_grad()
def test_padding_belongs_to_no_prompt(build_by_prompt):
    model = build_by_prompt("smear")
    expected, ids = routed(model), torch.tensor([PROMPT + ANSWER])
    padded = {"input_ids": torch.tensor([[0, 0, *PROMPT]])}
    padded["attention_mask"] = torch.tensor([[0, 0] + [1] * len(PROMPT)])
    molora.fix_routing(model, prompt=padded)
    with molora.static_routing(model):
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@torch.no_grad()
def test_peft_converts_it_to_lora(build_by_prompt):
    model = build_by_prompt("milora")
    expected, ids = routed(model), torch.tensor([PROMPT + ANSWER])
    molora.fix_routing(model, prompt=torch.tensor([PROMPT]))
    lora_config, state_dict = convert_to_lora(model, rank=2)
    from peft import set_peft_model_state_dict

    twin = build_by_prompt("milora").unload()
    lora = get_peft_model(twin, lora_config).eval()
    set_peft_model_state_dict(lora, state_dict)
    torch.testing.assert_close(lora(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method": "mola", "num_experts": 3},
            "a prompt doesn't fix the routing weights of 'model",
        ),
        ({"method": "smear", "gate": "decoupled", "gate_options": {}}, "its router or gate reads"),
        ({"method": "mixlora"}, "mixes the outputs of whole feed-forward networks|doesn't fix"),
    ],
    ids=str,
)
def test_what_a_prompt_does_not_fix_is_refused(fields: dict, message: str, build_by_prompt):
    with pytest.raises(ValueError, match=message):
        molora.fix_routing(build_by_prompt(**fields), prompt=torch.tensor([PROMPT]))


def test_one_prompt_at_a_time_and_this_adapter_alone(build_by_prompt):
    model = build_by_prompt("smear")
    with pytest.raises(ValueError, match=r"give one prompt, in tensors of one row; .* \[2\]"):
        molora.fix_routing(model, prompt=torch.tensor([PROMPT, PROMPT]))
    with pytest.raises(ValueError, match="give either weights, a task or a prompt"):
        molora.fix_routing(model, task=0, prompt=torch.tensor([PROMPT]))
    model.add_adapter("other", MoloraConfig(num_experts=1, target_modules=["q_proj"]))
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"\['other'\] are active, and 'default' alone is meant"):
        molora.fix_routing(model, prompt=torch.tensor([PROMPT]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": "x"}, "must be 3 finite numbers, not 'x'"),
        ({"weights": [1.0, "a", 0.0]}, "must be 3 finite numbers, not [1.0, 'a', 0.0]"),
        ({"prompt": "a text"}, "prompt='a text' must be a tensor of token ids (1, n)"),
    ],
    ids=str,
)
def test_what_is_no_weights_and_no_prompt(given: dict, said: str, build_by_prompt):
    with pytest.raises(ValueError, match=re.escape(said)):
        molora.fix_routing(build_by_prompt("smear", num_experts=3), **given)


def test_a_gate_that_reads_the_token_is_not_fixed_by_a_task(build_by_prompt):
    fields = {"router_options": {"num_tasks": 2}, "num_experts": 3}
    model = build_by_prompt("moelora-task", gate="decoupled", gate_options={}, **fields)
    with pytest.raises(ValueError, match="doesn't fix the routing weights"):
        molora.fix_routing(model, task=1)


def test_milora_is_calibrated(build_by_prompt):
    batches = [{"input_ids": torch.tensor([PROMPT + ANSWER]), "prompt_mask": torch.ones(1, 8)}] * 2
    report = molora.calibrate(
        build_by_prompt("milora"), batches, "least_squares", held_out=batches[:1]
    )
    assert max(site.relative_error for site in report.sites) < 0.05  # one prompt: one map
