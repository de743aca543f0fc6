"""Adapters weighed by how near a prompt is to their data."""

import re

import pytest
import torch

import molora

from .dense_mixture import by_formula

PROMPT = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def rows() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[5, 9, 33, 12, 8], [40, 7, 21, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
    }


def published(embedded, centroids, beta, threshold, most=50):
    """(B, E), one request after the other."""
    rows = []
    for v in embedded:
        cosine = torch.stack([v @ c / (v.norm() * c.norm()) for c in centroids.double()])
        w = torch.exp(-(1 - cosine) / beta**2)
        w = w / w.sum()
        w[w < threshold] = 0
        w[w.argsort(descending=True)[most:]] = 0
        rows.append(w / w.sum() if w.sum() > 0 else w)
    return torch.stack(rows)


def by_weights(base, folders, rows, weights):
    wide = weights.repeat_interleave(rows["input_ids"].shape[1], 0)
    return by_formula(base(), folders, lambda x, site, dense, present: wide, rows)


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "used"),
    [({"beta": 0.9}, [3, 3]), ({"beta": 0.3, "threshold": 0.2}, None), ({"most": 2}, None)],
    ids=str,
)
def test_it_is_its_formula(base, folders, rows, options, used):
    centroids = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).double()
    model = molora.compose(base(), folders, "ttmm", centroids=centroids, first=3, **options)
    table = base().get_input_embeddings().weight
    embedded = table[rows["input_ids"][:, :3]].mean(1)  # of prompts of four and three tokens
    weights = published(
        embedded, centroids, options.get("beta", 0.2), options.get("threshold", 0.01),
        options.get("most", 50),
    )  # fmt: skip
    if used is not None:
        assert (weights > 0).sum(-1).tolist() == used
    else:
        assert (weights == 0).any() and len(set(weights[0].tolist())) > 1
    expected = by_weights(base, folders, rows, weights)
    actual = model(**rows, prompt_mask=PROMPT).logits
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_embeddings_of_ones_own(base, folders, rows):
    centroids, requests = torch.randn(3, 6), torch.randn(2, 6)
    model = molora.compose(base(), folders, "ttmm", centroids=centroids, source="request", beta=0.7)
    expected = by_weights(base, folders, rows, published(requests.double(), centroids, 0.7, 0.01))
    actual = model(**rows, request_embeddings=requests).logits
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    with pytest.raises(ValueError, match="router 'centroid' needs an embedding of each sequence"):
        model(**rows)
    with pytest.raises(ValueError, match=r"request_embeddings has the shape \(2, 7\)"):
        model(**rows, request_embeddings=torch.zeros(2, 7))


@torch.no_grad()
def test_where_no_adapter_is_near_enough_the_base_model_is_left(base, folders, rows, logits_of):
    model = molora.compose(
        base(), folders, "ttmm", centroids=torch.randn(3, 32), beta=50.0, threshold=0.4
    )
    with molora.observe(model) as records:
        actual = model(**rows, prompt_mask=PROMPT).logits
    assert all((routing.weights == 0).all() for routing in records.values())
    torch.testing.assert_close(actual, logits_of(base(), rows), atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_it_is_decided_by_the_prompt_and_kept(base, folders, rows):
    model = molora.compose(base(), folders, "ttmm", centroids=torch.randn(3, 32), beta=1.0)
    ids = rows["input_ids"][:1]
    whole = model(ids, prompt_mask=PROMPT[:1]).logits
    start = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 4:], atol=1e-10, rtol=1e-10)
    padded = torch.cat([torch.zeros(1, 2).long(), ids], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    prompt = torch.tensor([[0, 0, 1, 1, 1, 1, 0]])
    left = model(padded, attention_mask=mask, prompt_mask=prompt).logits
    # The rotary embedding of the shifted positions is formed in fp32.
    torch.testing.assert_close(left[:, 2:], whole, atol=1e-6, rtol=1e-6)


def test_centroids_are_mean_directions_of_the_data(base, rows):
    model = base()
    found = molora.fit_centroids(model, [[rows], [{"input_ids": rows["input_ids"][:1]}]], first=2)
    table = model.get_input_embeddings().weight.detach()
    first, second = (table[row[:2]].mean(0) for row in rows["input_ids"])
    mean = first / first.norm() + second / second.norm()
    expected = torch.stack([mean / mean.norm(), first / first.norm()])
    torch.testing.assert_close(found, expected)
    whole = molora.fit_centroids(model, [[rows]])  # the padding of the second row isn't counted
    lengths = [table[row[:n]].mean(0) for row, n in zip(rows["input_ids"], (5, 4), strict=True)]
    mean = sum(v / v.norm() for v in lengths)
    torch.testing.assert_close(whole[0], mean / mean.norm())


def test_what_is_refused(base, folders, rows):
    given = torch.randn(3, 32)
    for options, message in (
        ({}, "router='ttmm' needs centroids: a row for each adapter"),
        ({"centroids": given[:2]}, "centroids has 2 entries for 3 adapters"),
        ({"centroids": given[0]}, "centroids has the shape (32,)"),
        ({"centroids": given * torch.tensor([[1], [0], [1]])}, "centroids[1] is 0"),
        ({"centroids": "near"}, "centroids must be rows of numbers of one length"),
        ({"centroids": [[1, 2], [3], [4]]}, "centroids must be rows of numbers of one length"),
        ({"centroids": given / 0}, "centroids must be finite numbers"),
        ({"centroids": given, "beta": 0}, "beta=0 must be a number above 0"),
        ({"centroids": given, "beta": "0.2"}, "beta='0.2' must be a finite number"),
        ({"centroids": given, "source": "text"}, "source 'text'; known: request, tokens"),
        ({"centroids": given, "first": 0}, "first=0 must be at least 1"),
        ({"centroids": given, "most": 1}, "most=1 must be at least 2"),
        ({"centroids": given, "threshold": 0.6}, "threshold=0.6 lets at most one expert in"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            molora.compose(base(), folders, "ttmm", **options)
    model = molora.compose(base(), folders, "ttmm", centroids=torch.randn(3, 7))
    with pytest.raises(ValueError, match="centroids of width 7, but the model's .* have 32"):
        model(**rows, prompt_mask=PROMPT)
    with pytest.raises(ValueError, match="nothing says which tokens are a prompt"):
        molora.compose(base(), folders, "ttmm", centroids=given)(**rows)
    with pytest.raises(ValueError, match=r"batches\[1\] is empty"):
        molora.fit_centroids(base(), [[rows], []])
    with pytest.raises(ValueError, match="^batches is empty"):
        molora.fit_centroids(base(), [])
    with pytest.raises(ValueError, match="a batch has no input_ids"):
        molora.fit_centroids(base(), [[{"x": given}]])
    with pytest.raises(ValueError, match="first=0 must be a whole number of at least 1"):
        molora.fit_centroids(base(), [[rows]], first=0)
