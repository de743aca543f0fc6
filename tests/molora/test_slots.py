"""Slots: every chosen expert once, with its weight; gradients of the weighted sum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molora.row_blocks import ROWS
from molora.slots import fill_slots


@st.composite
def sparse_weights(draw: st.DrawFn) -> Tensor:
    tokens, experts = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, experts, generator=generator) + 0.1
    return weights * (torch.rand(tokens, experts, generator=generator) < draw(st.floats(0, 1)))


@given(weights=sparse_weights(), fixed=st.booleans())
def test_each_chosen_expert_has_one_slot(weights: Tensor, fixed: bool):
    used = int((weights != 0).sum(-1).max()) if len(weights) else 0
    count = max(used, 1)
    slots = fill_slots(weights, count if fixed else None, keep_zeros=False)
    assert slots.count == count or not len(weights)
    one_hot = slots.one_hot.view(len(weights), slots.count, weights.shape[1])
    torch.testing.assert_close((one_hot * slots.weights[..., None]).sum(1), weights)
    assert torch.equal(one_hot.sum(1), (weights != 0).float())
    nobody = (weights == 0).all(-1)
    torch.testing.assert_close(slots.weights.sum(-1), torch.where(nobody, 1.0, weights.sum(-1)))


def test_zeros_are_kept_where_they_take_part():
    weights = torch.tensor([[0.0, 0.7, 0.3], [0.0, 0.0, 0.0]], requires_grad=True)
    slots = fill_slots(weights, 3, keep_zeros=True)
    one_hot = slots.one_hot.view(2, 3, 3)
    assert torch.equal(one_hot[0], torch.eye(3))
    assert slots.weights.tolist()[1] == [1.0, 0.0, 0.0] and not one_hot[1, 0].any()
    outputs = torch.arange(6.0).view(6, 1)
    slots.combine(outputs).sum().backward()
    assert weights.grad is not None and weights.grad[0].tolist() == [0.0, 1.0, 2.0]
    assert weights.grad[1, 0] == 0  # its slot is the base network's


@pytest.mark.parametrize("count", [1, 3])
def test_the_weighted_sum_has_its_gradients(count: int):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(4, count, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(4 * count, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    slots = fill_slots(weights, count, keep_zeros=False)
    expected = (rows.view(4, count, 2) * weights[..., None]).sum(1)
    torch.testing.assert_close(slots.combine(rows), expected)

    def combine(w: Tensor, r: Tensor) -> Tensor:
        return fill_slots(w, count, keep_zeros=False).combine(r)

    assert torch.autograd.gradcheck(combine, (weights, rows))


def test_many_tokens_are_repeated_and_added_up_block_by_block():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2 * ROWS + 9, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(len(tokens), 3, generator=generator, dtype=torch.float64)
    probe = torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
    gradients = []
    for ours in (True, False):
        x, w = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
        slots = fill_slots(w, 3, keep_zeros=False)
        rows = slots.rows(x) if ours else x.repeat_interleave(3, 0)
        h = rows.sin() * torch.arange(1, 4).repeat(len(tokens))[:, None]
        y = slots.combine(h) if ours else (h.view(-1, 3, 2) * w[..., None]).sum(1)
        gradients.append((y, *torch.autograd.grad((y * probe).sum(), (x, w))))
    torch.testing.assert_close(*gradients)


def test_the_sum_is_added_up_in_the_weights_precision():
    rows = torch.full((3, 1), 1.0, dtype=torch.bfloat16)
    weights = torch.tensor([[0.334, 0.333, 0.333]])  # rounded to bf16 they would sum to 1.002
    slots = fill_slots(weights, 3, keep_zeros=False)
    assert slots.combine(rows).item() == 1.0
