"""T-REX from its formula: a full matrix of weights between down and up vectors."""

import pytest
import torch

from molora import MoloraConfig
from molora.experts import EXPERTS, SiteSpec

from .test_mor1e import gates, with_scores


def formula(site):
    A, B = site.p["experts.A"], site.p["experts.B"]
    y, gamma = site.base(), gates(site)
    for i, a in enumerate(A):
        for j, b in enumerate(B.unbind(1)):
            y = y + (gamma[:, i * B.shape[1] + j] * (site.x @ a))[:, None] * b
    return y


@pytest.mark.parametrize("instance", [False, True], ids=["token", "instance"])
def test_formula(fidelity, instance: bool):
    config = MoloraConfig.from_method(
        "t-rex",
        num_experts=6 if instance else [6, 4],
        expert_options={"down_vectors": 2},
        gate_options={"instance": instance},
    )
    with_scores(fidelity(config), experts=6).check(formula)


def build(count: int, shared: int = 0, **options):
    spec = SiteSpec(5, 3, (1,) * count, (1,) * shared, scaling=(2.0,) * (count + shared))
    return EXPERTS.build("rank_pairs", options, spec=spec)


@pytest.mark.parametrize(
    ("experts", "grid"), [(32, (4, 8)), (12, (3, 4)), (7, (1, 7)), (1, (1, 1))]
)
def test_the_default_grid_is_the_squarest(experts: int, grid: tuple[int, int]):
    pairs = build(experts)
    assert (pairs.A.shape[0], pairs.B.shape[1]) == grid


@pytest.mark.parametrize("routed", [True, False])
def test_the_delta_of_fixed_weights(routed: bool):
    torch.manual_seed(0)
    experts = build(6) if routed else build(0, shared=1)
    experts.reset_parameters(False, lambda: torch.zeros(3, 5))
    x, weights = torch.randn(4, 5), torch.rand(6) if routed else None
    y = experts(x, None if weights is None else weights.expand(4, 6), torch.zeros(4, 3))
    assert y.abs().max() > 0.01
    torch.testing.assert_close(x @ experts.delta_weight(weights).T, y)
    alone = experts(x[0], None if weights is None else weights[None], torch.zeros(3))
    torch.testing.assert_close(alone, y[0])


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="down_vectors=4 must divide the number of experts, 6"):
        build(6, down_vectors=4)
    with pytest.raises(ValueError, match="down_vectors=4 must divide the number of experts, 30"):
        MoloraConfig.from_method("t-rex", num_experts=30)
    with pytest.raises(ValueError, match="need r=1 and no shared experts"):
        build(6, shared=1)
