"""Experts that share a factor, against a sum over experts."""

import pytest
import torch
from torch import Tensor

from molora.experts import EXPERTS, SiteSpec

E, RANK, SHARED, D_IN, D_OUT = 3, 2, 4, 6, 5


def build(name: str, **options):
    torch.manual_seed(0)
    spec = SiteSpec(D_IN, D_OUT, (RANK,) * E, (SHARED,), scaling=(0.5, 2.0, 1.5, 3.0))
    experts = EXPERTS.build(name, options, spec=spec)
    experts.reset_parameters(False, lambda: torch.zeros(D_OUT, D_IN))
    return experts.double()


def expert(experts, e: int) -> Tensor:
    """(d_out, d_in) scaling times B_e A_e; the last one is always on."""
    A, B = experts.A, experts.B
    own = slice(RANK * e, RANK * (e + 1)) if e < E else slice(-SHARED, None)
    tied = slice(0, RANK) if e < E else slice(-SHARED, None)
    a, b = (A[tied], B[:, own]) if experts.tied == "A" else (A[own], B[:, tied])
    return experts.scaling[e] * b @ a


@pytest.mark.parametrize("name", ["shared_a", "shared_b"])
def test_against_a_sum_over_experts(name: str):
    experts = build(name)
    sizes = {"A": RANK, "B": E * RANK} if name == "shared_a" else {"A": E * RANK, "B": RANK}
    assert experts.A.shape == (sizes["A"] + SHARED, D_IN)
    assert experts.B.shape == (D_OUT, sizes["B"] + SHARED)
    x, weights = torch.randn(7, D_IN).double(), torch.rand(7, E).double()
    single = torch.stack([x @ expert(experts, e).T for e in range(E)], 1)
    result = torch.randn(7, D_OUT).double()
    expected = result + (weights[..., None] * single).sum(1) + x @ expert(experts, E).T
    torch.testing.assert_close(experts(x, weights, result.clone()), expected)
    torch.testing.assert_close(experts.outputs(x), single)
    delta = sum(float(weights[0, e]) * expert(experts, e) for e in range(E)) + expert(experts, E)
    torch.testing.assert_close(
        experts.delta_weight(weights[0]).double(), delta, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["shared_a", "shared_b"])
def test_drop_connect_spares_the_expert_that_is_always_on(name: str):
    experts = build(name, drop_connect=0.5)
    factor = experts.tied
    stored = getattr(experts, factor)
    used = experts.training_factors()["AB".index(factor)]
    if factor == "B":
        stored, used = stored.T, used.T
    assert torch.equal(used[RANK:], stored[RANK:])
    kept = used[:RANK] != 0
    assert kept.any() and not kept.all()
    torch.testing.assert_close(used[:RANK][kept], 2 * stored[:RANK][kept])
    assert experts.factors()["AB".index(factor)] is getattr(experts, factor)


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_drop_connect_is_a_probability(value: float):
    with pytest.raises(ValueError, match=f"drop_connect={value}"):
        build("shared_a", drop_connect=value)


def test_a_shared_down_factor_gives_no_expert_a_score_of_its_own():
    with pytest.raises(ValueError, match="SharedAExperts has no down factor of its own"):
        build("shared_a").down_factor()
