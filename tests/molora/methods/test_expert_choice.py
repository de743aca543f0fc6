"""Expert Choice from its formula: each expert's list of tokens, made from the real ones alone."""

import pytest
import torch
from peft import get_peft_model

from molora import MoloraConfig, SiteInput
from molora.gates import GATES

from ..test_contract import PROMPTS, collate


def formula(site):
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    real = [t for t in range(len(probs)) if site.mask[t]]
    experts = probs.shape[1]
    capacity = int(len(real) * 1.5 / experts)
    chosen = torch.zeros_like(probs)
    for e, column in enumerate(probs.T.tolist()):
        for t in sorted(real, key=lambda t: -column[t])[:capacity]:
            chosen[t, e] = 1
    assert len(chosen[site.mask].sum(-1).unique()) > 1  # a token has as many experts as want it
    return site.mix(probs * chosen)


def test_formula(fidelity):
    config = MoloraConfig.from_method(
        "expert-choice", num_experts=[5, 3], r=[2, 3], gate_options={"capacity": 1.5}
    )
    case = fidelity(config)
    case.check(formula)
    case.check(formula, train=False)


def choose(logits, mask=None, **options):
    gate = GATES.build(
        "expert_choice", options, num_experts=logits.shape[1], top_k=None, in_features=3
    )
    return gate(logits, SiteInput(torch.zeros(len(logits), 3), mask=mask)).selected


def test_of_equal_tokens_the_first_is_chosen_and_padding_never():
    real = torch.tensor([False, True, True, True, False])
    assert choose(torch.zeros(5, 2), real).nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1],
                                                                  [3, 0], [3, 1]]  # fmt: skip
    assert choose(torch.zeros(5, 2), real, capacity=1.0).nonzero().tolist() == [[1, 0], [1, 1]]
    assert not choose(torch.zeros(5, 2), torch.zeros(5, dtype=torch.bool)).any()


def test_every_expert_gets_at_least_one_token_and_at_most_all():
    torch.manual_seed(0)
    logits = torch.randn(3, 8)
    assert choose(logits, capacity=0.1).sum(0).tolist() == [1] * 8
    assert choose(logits, capacity=100.0).all()


def test_a_capacity_of_nothing_is_refused():
    with pytest.raises(ValueError, match="capacity=0 must be above 0"):
        MoloraConfig(gate="expert_choice", gate_options={"capacity": 0})


@pytest.fixture
def model(tiny_model):
    config = MoloraConfig.from_method(
        "expert-choice", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama"), config).eval()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    length = max(map(len, PROMPTS))
    batches = [collate(PROMPTS, side, length + extra) for extra in (0, 7)]
    logits = [model(**batch).logits[batch["attention_mask"].bool()] for batch in batches]
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_rows_of_a_mixed_batch_leave_their_padding_out_too(model):
    batch = collate(PROMPTS[:2], "right", 9)
    names = ["default", "default"]
    mixed, plain = model(**batch, adapter_names=names).logits, model(**batch).logits
    torch.testing.assert_close(mixed, plain)


def test_generation_with_a_cache_is_refused(model):
    batch = collate(PROMPTS[:1], "left", len(PROMPTS[0]))
    past = model(**batch).past_key_values  # the base model's own doing, of a whole sequence
    refusal = "'expert_choice' can't generate with a KV cache: .*Use gate='top_k'"
    for attempt in (
        lambda: model.generate(**batch, max_new_tokens=2),
        lambda: model(**batch, use_cache=True),
        lambda: model(batch["input_ids"], past_key_values=past),
    ):
        with pytest.raises(RuntimeError, match=refusal):
            attempt()
    with torch.no_grad():
        model(**batch, use_cache=False)  # nothing of the refused passes is remembered
        longer = model.generate(**batch, max_new_tokens=2, use_cache=False, do_sample=False)
    assert longer.shape[1] > batch["input_ids"].shape[1]
