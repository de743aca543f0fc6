"""Blocks cover all rows once."""

import pytest
import torch

from molora.feedforward_roles import _Gated
from molora.row_blocks import ROWS, row_blocks


@pytest.mark.parametrize("rows", [0, 1, ROWS, ROWS + 1, 3 * ROWS - 1])
def test_every_row_is_in_one_block(rows: int):
    numbers = torch.arange(rows)
    blocks = [numbers[part] for part in row_blocks(rows, numbers.device)]
    assert all(0 < len(block) <= ROWS for block in blocks)
    assert torch.equal(torch.cat([numbers[:0], *blocks]), numbers)
    assert len(list(row_blocks(rows, torch.device("meta")))) == (rows > 0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gated_product_has_the_same_gradients_block_by_block(fused: bool):
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(ROWS + 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    gate, up = both.chunk(2, -1) if fused else (both[:, ::2], both[:, 1::2])
    expected = gate / (1 + torch.exp(-gate)) * up
    actual = _Gated.apply(torch.nn.SiLU(), gate, up)
    torch.testing.assert_close(actual, expected)
    probe = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (theirs,) = torch.autograd.grad((expected * probe).sum(), both, retain_graph=True)
    (ours,) = torch.autograd.grad((actual * probe).sum(), both)
    torch.testing.assert_close(ours, theirs)
