"""Steer-MoE from its formula: vectors that shift the output, chosen by it."""

import pytest
import torch

from molora import MoloraConfig
from molora.experts import EXPERTS, SiteSpec


def formula(site):
    u = site.base()
    p = (u @ site.p["router.weight"].T + site.p["router.bias"]).softmax(-1)
    y = u
    for e, v in enumerate(site.p["experts.vectors"]):
        y = y + site.p["experts.scale"] * p[:, e, None] * v
    return y


def test_formula(fidelity):
    config = MoloraConfig.from_method("steermoe", num_experts=[3, 5])
    case = fidelity(config)
    assert list(case.layers()) == ["layers.0.down_proj", "layers.1.down_proj"]
    case.check(formula)


def test_each_expert_shifts_every_token_alike():
    spec = SiteSpec(3, 4, (1, 1), (1,), scaling=(2.0, 1.0, 0.5))
    experts = EXPERTS.build("steering_vectors", {"scale": 0.5}, spec=spec)
    experts.reset_parameters(False, lambda: torch.zeros(4, 3))
    single = experts.outputs(torch.randn(5, 3))
    for e, scaling in enumerate((2.0, 1.0)):
        expected = (0.5 * scaling * experts.vectors[e]).expand(5, 4)
        torch.testing.assert_close(single[:, e], expected)
    only = experts(torch.randn(5, 3), torch.tensor([[1.0, 0]] * 5), torch.zeros(5, 4))
    torch.testing.assert_close(only, single[:, 0] + 0.25 * experts.vectors[2])


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="scale=0"):
        MoloraConfig.from_method("steermoe", expert_options={"scale": 0})
