"""How low-rank factors start: the deviation that a configuration asks for, or a refusal."""

import pytest
import torch

from molora import MoloraConfig, SiteSpec
from molora.experts import EXPERTS
from molora.experts.start import start_down, start_up

# Kinds that need more than equal ranks and no options.
RANKS = {"rank_pairs": (1, 1, 1, 1)}
OPTIONS = {"module_adapters": {"modules": ["a", "b", "c", "d"], "adapter": None}}
KINDS = EXPERTS.names()
GAUSSIAN = [name for name in KINDS if EXPERTS.get(name).takes_gaussian]


def test_deviations():
    down, up = torch.empty(64, 4096), torch.empty(4096, 64)
    start_down(down, True)  # uniform over +-1 / sqrt(d_in)
    assert down.abs().max() <= 4096**-0.5
    assert down.std().item() == pytest.approx((3 * 4096) ** -0.5, rel=0.02)
    start_down(down, "gaussian")
    assert down.std().item() == pytest.approx(1 / 64, rel=0.02)
    start_down(down, "gaussian", rank=4)
    assert down.std().item() == pytest.approx(1 / 4, rel=0.02)
    start_up(up, "gaussian")
    assert not up.any()
    start_up(up, False)
    assert up.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.02)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_a_kind_that_takes_gaussian_starts_draws_other_numbers_by_it(name: str):
    ranks = RANKS.get(name, (2,) * 4)
    experts = EXPERTS.build(
        name,
        OPTIONS.get(name, {}),
        spec=SiteSpec(16, 12, ranks, (), (1.0,) * 4, module="a"),
    )
    drawn = []
    for init in (True, "gaussian"):
        torch.manual_seed(0)
        experts.reset_parameters(init, lambda: torch.zeros(12, 16))
        drawn.append([parameter.detach().clone() for parameter in experts.parameters()])
    assert any(not torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize("name", sorted(set(KINDS) - set(GAUSSIAN)))
def test_other_kinds_refuse_it(name: str):
    with pytest.raises(ValueError, match=f"'gaussian' has no effect with experts='{name}'"):
        rank = 1 if name.endswith("vectors") else 4
        MoloraConfig(experts=name, r=rank, num_experts=4, init_lora_weights="gaussian")
