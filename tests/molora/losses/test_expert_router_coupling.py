"""ERC from its formula, its noise, and what makes it zero."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from molora.losses import LOSSES

from .records import loss, record

NAME = "expert_router_coupling"
RANKS = (1, 2, 3, 1)


def parameters(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = {"generator": generator, "dtype": torch.float64}
    return torch.randn(4, 5, **make).requires_grad_(), torch.randn(7, 5, **make).requires_grad_()


def value(rows: Tensor, A: Tensor, ranks: tuple[int, ...] = RANKS, **options) -> Tensor:
    experts = SimpleNamespace(ranks=ranks, down_factor=lambda: A)
    fields = {"hidden": torch.zeros(8, A.shape[1]), "router": SimpleNamespace(weight=rows)}
    return loss(NAME, record(experts=len(rows)), options, experts=experts, **fields)


def formula(rows: Tensor, A: Tensor, alpha: float, normalize: bool = False) -> Tensor:
    total, blocks = 0, A.split(RANKS)

    def m(i, j):
        size = rows[i].norm() * blocks[j].norm() if normalize else 1
        return (blocks[j] @ rows[i]).norm() / size

    for i in range(4):
        for j in range(4):
            if i != j:
                total = total + (m(i, j) - alpha * m(i, i)).clamp(min=0)
                total = total + (m(j, i) - alpha * m(i, i)).clamp(min=0)
    return total / 16


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("normalize", [False, True])
def test_formula_and_gradients(alpha: float, normalize: bool):
    rows, A = parameters()
    ours = value(rows, A, noise=False, alpha=alpha, normalize=normalize)
    theirs = formula(rows, A, alpha, normalize)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(v, (rows, A)) for v in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert a.any()


def test_noise_keeps_a_row_nearer_to_itself_than_half_way_to_the_next():
    rows, A = parameters()
    torch.manual_seed(0)
    noisy = value(rows, A)
    torch.manual_seed(0)
    draws = torch.rand(4, 5, dtype=torch.float64)
    factors = torch.empty_like(draws)
    for i in range(4):
        nearest = min((rows[i] - rows[j]).norm().item() for j in range(4) if j != i)
        bound = nearest / 2 / rows[i].norm().item()
        factors[i] = 1 - bound + 2 * bound * draws[i]
        assert (factors[i] * rows[i] - rows[i]).norm() <= nearest / 2
    torch.testing.assert_close(noisy, formula(rows * factors, A, 1.0), rtol=1e-12, atol=0)


def test_an_expert_that_answers_to_its_own_row_alone_costs_nothing():
    axes = torch.eye(4, dtype=torch.float64)
    assert value(axes, axes, ranks=(1,) * 4, noise=False).item() == 0
    # the other way round: each of the 4 experts answers to its neighbour's row alone
    assert value(axes, axes.roll(1, 0), ranks=(1,) * 4, noise=False).item() == 8 / 16


def test_one_expert_has_nobody_to_be_told_from():
    assert value(torch.ones(1, 3), torch.ones(2, 3), ranks=(2,)).item() == 0


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match="alpha=0"):
        LOSSES.build(NAME, {"alpha": 0})
