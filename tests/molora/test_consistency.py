"""The agreement of two passes from the definition of the divergence."""

import math

import pytest
import torch

from molora import consistency_loss


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_it_is_the_mean_of_both_divergences_over_the_real_positions():
    torch.manual_seed(0)
    first, second = torch.randn(2, 2, 3, 5, dtype=torch.float64).unbind()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    terms = []
    for i, t in mask.nonzero().tolist():
        p, q = (z[i, t].softmax(-1).tolist() for z in (first, second))
        terms.append((divergence(p, q) + divergence(q, p)) / 2)
    found = consistency_loss(first, second, mask)
    assert found.item() == pytest.approx(sum(terms) / 3, rel=1e-12)
    assert consistency_loss(second, first, mask).item() == pytest.approx(found.item(), rel=1e-12)
    everywhere = consistency_loss(first, second)
    assert everywhere.item() == pytest.approx(
        consistency_loss(first, second, torch.ones_like(mask)).item(), rel=1e-12
    )


def test_padding_gets_no_gradient():
    first = torch.randn(1, 2, 4, requires_grad=True)
    second = torch.randn(1, 2, 4, requires_grad=True)
    mask = torch.tensor([[True, False]])
    consistency_loss(first, second, mask).backward()
    for z in (first, second):
        assert z.grad[0, 0].abs().sum() > 0 and z.grad[0, 1].abs().sum() == 0
    assert consistency_loss(first, second, torch.zeros_like(mask)) == 0


def test_low_precision_is_raised_to_fp32():
    first, second = torch.randn(2, 3, 7).bfloat16().unbind()
    found = consistency_loss(first, second)
    assert found.dtype == torch.float32
    expected = consistency_loss(first.double(), second.double())
    assert expected.dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"same shape, not \(2, 5\) and \(3, 5\)"):
        consistency_loss(torch.zeros(2, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"mask has shape \(3,\).*need \(2,\)"):
        consistency_loss(torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(3, dtype=torch.bool))
