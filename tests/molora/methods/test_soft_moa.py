"""Soft-MoA and Omni-SMoLA from their formulas, sequence by sequence."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

import molora
from molora import MoloraConfig

from ..test_contract import PROMPTS, collate

ALLOWED = {"allow_non_causal": True}


def formula(site, slots: int):
    y, count = site.base().unflatten(0, site.shape).clone(), len(site.ranks)
    x, mask = site.x.unflatten(0, site.shape), site.mask.view(site.shape)
    A, B = site.p["experts.A"], site.p["experts.B"]
    rows = []
    for row in range(site.shape[0]):
        L = x[row] @ site.p["router.weight"].T  # (m, E p)
        C = L.softmax(-1)
        D = torch.zeros_like(L)
        D[mask[row]] = L[mask[row]].softmax(0)
        added = 0
        for e in range(count):
            for slot in range(e * slots, (e + 1) * slots):
                read = (D[:, slot, None] * x[row]).sum(0)
                if "experts.a" in site.p:
                    inner = F.gelu(A[e] @ read + site.p["experts.a"][e])
                    z = B[e] @ inner + site.p["experts.b"][e]
                else:
                    z = B[e] @ (A[e] @ read)
                added = added + C[:, slot, None] * (site.scaling[e] * z)
        rows.append(y[row] + added)
    return torch.stack(rows).flatten(0, 1)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("name", ["soft-moa", "omni-smola"])
def test_formula(fidelity, name: str, slots: int):
    config = MoloraConfig.from_method(
        name, num_experts=3, r=2, lora_alpha=3, gate_options={"slots": slots}
    )
    fidelity(config).check(lambda site: formula(site, slots))


def build(tiny_model, randomize, base: str, **fields):
    config = MoloraConfig.from_method("omni-smola", num_experts=3, **fields)
    return randomize(get_peft_model(tiny_model(base), config)).eval()


def test_padding_and_batch_mates_change_no_token_of_an_encoder(tiny_model, randomize, logits_of):
    model = build(tiny_model, randomize, "bert")
    rows = [{k: v[:, :9] for k, v in collate([p], "right", 9).items()} for p in PROMPTS]
    batched = logits_of(model, collate(PROMPTS, "right", 9))
    for i, prompt in enumerate(PROMPTS):
        alone = logits_of(model, collate([prompt], "right", len(prompt)))
        torch.testing.assert_close(batched[i], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits_of(model, rows[i])[0], alone[0], atol=1e-5, rtol=1e-5)


def test_every_token_gets_a_mean_of_slots(tiny_model, randomize, tiny_batch, logits_of):
    model = build(tiny_model, randomize, "bert")
    with molora.observe(model) as records:
        logits_of(model, tiny_batch("bert"))
    for routing in records.values():
        total = routing.weights.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_causal_models_are_refused(tiny_model):
    config = MoloraConfig.from_method("soft-moa")
    with pytest.raises(ValueError, match="a LlamaForCausalLM predicts the next token"):
        get_peft_model(tiny_model("llama"), config)
    with pytest.raises(ValueError, match="task_type='CAUSAL_LM' predicts the next"):
        MoloraConfig.from_method("soft-moa", task_type="CAUSAL_LM")
    everywhere = MoloraConfig.from_method("soft-moa", target_modules=["q"])
    with pytest.raises(ValueError, match="decoder's module 'decoder.block.0"):
        get_peft_model(tiny_model("t5"), everywhere)
    encoder = MoloraConfig.from_method("soft-moa", target_modules=r"encoder.*\.q")
    assert get_peft_model(tiny_model("t5"), encoder).num_parameters() > 0
    allowed = MoloraConfig.from_method("soft-moa", gate_options=ALLOWED)
    model = get_peft_model(tiny_model("llama"), allowed).eval()
    with pytest.raises(RuntimeError, match="can't generate with a KV cache"):
        model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=True)


def test_tokens_whose_sequences_are_lost_are_refused():
    config = MoloraConfig.from_method("omni-smola", target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    with pytest.raises(RuntimeError, match="'0' has lost its sequences: it is 6 rows"):
        model(torch.randn(6, 4))


def test_packed_rows_are_refused(tiny_model):
    config = MoloraConfig.from_method("soft-moa", gate_options=ALLOWED)
    model = get_peft_model(tiny_model("llama"), config).eval()
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(RuntimeError, match="packs several sequences into one"):
        model(input_ids=torch.tensor([PROMPTS[0]]), position_ids=places, use_cache=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": "lora"}, "don't go together: of the two the gate alone mix"),
        ({"gate": "dense", "gate_options": {}}, "of the two the experts alone mix"),
        ({"gate_options": {"slots": 0}}, "slots=0 must be at least 1"),
        ({"mixing": "feed_forward"}, "needs mixing='linear'"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MoloraConfig.from_method("omni-smola", **fields)
