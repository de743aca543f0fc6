"""Every parametrisation as plain LoRA factors, against what its own forward computes."""

from typing import Any

import pytest
import torch

from molora.experts import EXPERTS, Experts, SiteSpec

D_IN, D_OUT = 9, 8
# (name, ranks, shared ranks, options): equal and unequal ranks, with and without shared experts
BANKS: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("lora", (2, 2, 2), (), {}),
    ("lora", (1, 3, 2), (2, 1), {}),
    ("lora", (), (3, 1), {}),
    ("shared_a", (2, 2, 2), (3,), {}),
    ("shared_b", (2, 2, 2), (3,), {}),
    ("shared_a", (), (2,), {}),
    ("sparse_projection", (2, 2), (1,), {}),
    ("svd_segments", (2, 1), (3,), {}),
    ("rank_pairs", (1,) * 6, (), {}),
    ("rank_pairs", (), (1,) * 6, {}),
]
every_bank = pytest.mark.parametrize("bank", BANKS, ids=lambda b: f"{b[0]}{b[1]}{b[2]}")


def build(bank: tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]) -> Experts:
    name, ranks, shared_ranks, options = bank
    torch.manual_seed(0)
    equal = name == "rank_pairs"
    scaling = tuple(2.0 if equal else 0.5 + 0.25 * e for e in range(len(ranks + shared_ranks)))
    spec = SiteSpec(D_IN, D_OUT, ranks, shared_ranks, scaling)
    experts: Experts = EXPERTS.build(name, options, spec=spec).double()
    experts.reset_parameters(False, lambda: torch.randn(D_OUT, D_IN, dtype=torch.float64))
    for tensor in (*experts.parameters(), *experts.buffers()):
        tensor.data = torch.randn(tensor.shape, dtype=torch.float64)
    return experts.eval()


def forward(experts: Experts, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """What the experts add to the tokens with these weights for each of them."""
    if weights is not None:
        weights = weights.expand(len(x), -1).contiguous()
    with torch.no_grad():
        return experts(x, weights, torch.zeros(len(x), D_OUT, dtype=x.dtype))


@every_bank
def test_factors_and_their_mixture_equal_the_forward(bank):
    experts = build(bank)
    x = torch.randn(5, D_IN, dtype=torch.float64)
    weights = torch.rand(len(bank[1]), dtype=torch.float64) if bank[1] else None
    expected = forward(experts, x, weights)
    factors = experts.lora_factors()
    assert factors.num_routed == len(bank[1])
    assert factors.A.shape == (sum(factors.ranks), D_IN)
    assert factors.B.shape == (D_OUT, sum(factors.ranks))
    close = {"atol": 1e-12, "rtol": 1e-12}
    A, B = factors.mixed(weights)
    torch.testing.assert_close(x @ A.T @ B.T, expected, **close)
    gate = factors.per_rank(weights)
    torch.testing.assert_close(x @ factors.A.T * gate @ factors.B.T, expected, **close)
    torch.testing.assert_close(x @ experts.delta_weight(weights).T, expected, **close)


@pytest.mark.parametrize("bank", [BANKS[1], BANKS[6]], ids=lambda b: b[0])
def test_the_shared_experts_may_be_weighted_too(bank):
    experts = build(bank)
    x = torch.randn(5, D_IN, dtype=torch.float64)
    weights = torch.rand(len(bank[1] + bank[2]), dtype=torch.float64)
    expected = forward(experts, x, weights)
    torch.testing.assert_close(
        x @ experts.delta_weight(weights).T, expected, atol=1e-12, rtol=1e-12
    )


def test_experts_of_weight_zero_take_no_rank_and_a_shared_factor_counts_once():
    weights = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64)
    A, B = build(("lora", (1, 3, 2), (2,), {})).lora_factors().mixed(weights)
    assert A.shape == (3 + 2, D_IN) and B.shape == (D_OUT, 3 + 2)
    for name in ("shared_a", "shared_b"):
        A, B = build((name, (2, 2, 2), (3,), {})).lora_factors().mixed(weights)
        assert A.shape == (2 + 3, D_IN) and B.shape == (D_OUT, 2 + 3)


def test_a_forward_that_drops_connections_in_training_is_merged_without():
    spec = SiteSpec(D_IN, D_OUT, (2, 2), (), (1.0, 1.0))
    experts = EXPERTS.build("shared_a", {"drop_connect": 0.5}, spec=spec)
    experts.reset_parameters(False, lambda: torch.zeros(()))
    weights = torch.ones(2)
    expected = experts.eval().delta_weight(weights)
    assert torch.equal(experts.train().delta_weight(weights), expected)


def test_experts_that_are_not_linear_say_so():
    class Squared(Experts):
        pass

    with pytest.raises(ValueError, match="Squared can't be written as LoRA factors"):
        Squared(SiteSpec(2, 2, (1,), (), (1.0,))).lora_factors()
