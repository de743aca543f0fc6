"""PHATGOOSE's gates and a preference of the whole request."""

import re

import pytest
import torch

import molora

from .dense_mixture import by_formula, phatgoose_scores, random_gates, top_2

PRIOR = torch.tensor([[0.9, 0.1, -0.3], [0.2, 0.4, 0.5]])


def expected_logits(base, folders, batch, prior, scale):
    gates = random_gates(folders)
    columns = batch["input_ids"].shape[1]

    def formula(x, site, dense, present):
        wide = prior.double().repeat_interleave(columns, 0)
        return top_2(phatgoose_scores(x, site, gates) + scale * wide, present)

    return by_formula(base(), folders, formula, batch)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0, 0.5, 3.0])
def test_it_is_its_formula(base, folders, batch, scale):
    gates = random_gates(folders)
    model = molora.compose(base(), folders, "glider", gates=gates, prior_scale=scale)
    expected = expected_logits(base, folders, batch, PRIOR, scale)
    actual = model(**batch, expert_prior=PRIOR).logits
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    with molora.routing_labels(model, expert_prior=PRIOR):
        assert torch.equal(model(**batch).logits, actual)


@torch.no_grad()
def test_a_request_is_compared_with_descriptions(base, folders, batch):
    descriptions, requests = torch.randn(3, 5), torch.randn(2, 5)
    model = molora.compose(
        base(), folders, "glider", gates=random_gates(folders), descriptions=descriptions,
        prior_scale=2,
    )  # fmt: skip
    unit = [m.double() / m.double().norm(dim=-1, keepdim=True) for m in (requests, descriptions)]
    expected = expected_logits(base, folders, batch, unit[0] @ unit[1].mT, 2.0)
    actual = model(**batch, request_embeddings=requests).logits
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_the_preference_lasts_through_a_generation(base, folders):
    model = molora.compose(base(), folders, "glider", gates=random_gates(folders))
    ids = torch.tensor([[5, 9, 33], [5, 9, 33]])
    labels = {"expert_prior": torch.eye(3)[[0, 2]]}
    with molora.routing_labels(model, **labels), molora.observe(model) as records:
        model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    first = records["model.layers.1.self_attn.q_proj"].weights.argmax(-1)  # all three are there
    assert first.tolist() == [0, 0, 0, 2, 2, 2, 0, 2, 0, 2]


def test_what_is_missing_is_said(base, folders, batch):
    gates = random_gates(folders)
    model = molora.compose(base(), folders, "glider", gates=gates)
    with pytest.raises(ValueError, match="router 'glider' needs how much each expert suits"):
        model(**batch)
    with pytest.raises(ValueError, match=r"expert_prior has the shape \(2, 4\); .* needs 3"):
        model(**batch, expert_prior=torch.zeros(2, 4))
    for options, message in (
        ({}, "router='glider' needs gates"),
        ({"gates": gates, "prior_scale": -1}, "prior_scale=-1 must not be negative"),
        ({"gates": gates, "descriptions": torch.zeros(2, 5)}, "descriptions has 2 entries for 3"),
        ({"gates": gates, "descriptions": torch.zeros(3)}, "descriptions has the shape (3,)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            molora.compose(base(), folders, "glider", **options)
