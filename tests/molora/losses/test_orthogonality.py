"""Orthogonality of outputs and of down factors, from loops over pairs."""

import pytest
import torch
from torch import Tensor

from molora.experts import EXPERTS, Experts, SiteSpec
from molora.losses import LOSSES

from .records import MASKS, loss, real_tokens, record

RANKS = (1, 2, 3, 2)


def experts(init: bool = False) -> Experts:
    torch.manual_seed(0)
    spec = SiteSpec(5, 6, RANKS, (2,), scaling=(1.0, 2.0, 0.5, 1.5, 1.0))
    built = EXPERTS.build("lora", {}, spec=spec).double()
    built.reset_parameters(init, lambda: torch.zeros(6, 5))
    return built


def hidden() -> Tensor:
    return torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mask", ["all", "some", "none"])
@pytest.mark.parametrize("normalize", [False, True])
def test_outputs(mask: str, normalize: bool):
    bank, x, routing = experts(), hidden(), record(mask=MASKS[mask], active=3)
    A, B = bank.A.split((*RANKS, 2)), bank.B.split((*RANKS, 2), 1)
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for t in real_tokens(routing):
        u = [s * b @ (a @ x[t]) for s, a, b in zip(bank.scaling, A, B, strict=True)]
        used = [e for e in range(4) if routing.weights[t, e] != 0]
        for j in used:
            for k in used:
                if j != k:
                    projection = (u[j] @ u[k]) / (u[k] @ u[k]) * u[k]
                    size = u[j] @ u[j] if normalize else 1
                    total, pairs = total + projection @ projection / size, pairs + 1
    expected = total / max(pairs if normalize else len(real_tokens(routing)), 1)
    options = {"normalize": normalize, "eps": 1e-30}
    value = loss("orthogonality", routing, options, hidden=x, experts=bank)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)
    if mask != "none":
        ours, theirs = (torch.autograd.grad(v, (bank.A, bank.B)) for v in (value, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
            assert a.any()


def test_a_sample_of_the_tokens_is_right_in_the_mean():
    bank, x, routing = experts(), hidden(), record(active=2)
    exact = loss("orthogonality", routing, {}, hidden=x, experts=bank).item()
    torch.manual_seed(0)
    draws = [
        loss("orthogonality", routing, {"max_tokens": 3}, hidden=x, experts=bank).item()
        for _ in range(600)
    ]
    assert min(draws) < exact < max(draws)
    deviation = torch.tensor(draws).std().item() / 600**0.5
    assert sum(draws) / 600 == pytest.approx(exact, abs=4 * deviation)


def test_new_experts_cost_nothing_and_keep_the_gradient_finite():
    bank, routing = experts(init=True), record(active=2)
    for normalize in (False, True):
        options = {"normalize": normalize}
        value = loss("orthogonality", routing, options, hidden=hidden(), experts=bank)
        assert value.item() == 0
        for grad in torch.autograd.grad(value, (bank.A, bank.B)):
            assert not grad.any()


@pytest.mark.parametrize("normalize", [False, True])
def test_down_factors(normalize: bool):
    bank = experts()
    A = bank.A.split((*RANKS, 2))[:4]
    if normalize:
        A = [a / a.norm() for a in A]
    expected = sum((A[i] @ A[j].T).norm() ** 2 for i in range(4) for j in range(i + 1, 4))
    options = {"of": "down_factor", "normalize": normalize}
    value = loss("orthogonality", record(), options, experts=bank)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_right_angles_and_copies():
    bank = experts()
    bank.A.data[:] = torch.cat([torch.eye(5, dtype=torch.float64), torch.zeros(5, 5)])
    options = {"of": "down_factor", "normalize": True}
    assert loss("orthogonality", record(), options, experts=bank).item() == 0
    bank.A.data[:] = 1.0
    bank.B.data[:] = 1.0
    # six pairs of equal directions: |a a^T|^2 of unit Frobenius norm is 1
    value = loss("orthogonality", record(), options, experts=bank).item()
    assert value == pytest.approx(6.0)
    value = loss("orthogonality", record(), {"normalize": True}, hidden=hidden(), experts=bank)
    assert value.item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(("option", "bad"), [("max_tokens", 0), ("eps", 0.0)])
def test_options_out_of_range(option: str, bad: float):
    with pytest.raises(ValueError, match=f"{option}={bad}"):
        LOSSES.build("orthogonality", {option: bad})


def test_an_unknown_subject():
    with pytest.raises(ValueError, match="known: down_factor, outputs"):
        LOSSES.build("orthogonality", {"of": "inputs"})
