"""Options of the published methods' gates and routers: their limits, and what they leave open."""

import pytest
import torch

from molora import MoloraConfig
from molora.gates import GATES
from molora.routers import ROUTERS
from molora.routing import SiteInput


@pytest.mark.parametrize(
    ("gate", "option", "bad"),
    [
        ("learned_threshold", "max_threshold", 0.0),
        ("learned_threshold", "max_threshold", 1.5),
        ("null_experts", "num_null", -1),
        ("sigmoid", "scale", 0.0),
        ("sigmoid", "update_rate", -1.0),
    ],
)
def test_gate_options_out_of_range(gate: str, option: str, bad: float):
    with pytest.raises(ValueError, match=f"{option}={bad}"):
        MoloraConfig(gate=gate, gate_options={option: bad})


@pytest.mark.parametrize("bad", [-0.1, 1.0])
def test_jitter_out_of_range(bad: float):
    with pytest.raises(ValueError, match=f"jitter={bad}"):
        MoloraConfig(router_options={"jitter": bad})


def test_jitter_is_finer_than_bf16():
    router = ROUTERS.build("linear", {"jitter": 0.01}, in_features=512, num_experts=512)
    router.weight.data = torch.eye(512)
    hidden = torch.ones(4, 512, dtype=torch.bfloat16)
    torch.manual_seed(0)
    factors = router(SiteInput(hidden))
    assert ((factors > 0.99 - 1e-6) & (factors < 1.01 + 1e-6)).all()
    assert len(factors.unique()) > 1000  # in bf16 there are three values between
    router.eval()
    assert torch.equal(router(SiteInput(hidden)), torch.ones(4, 512))


def test_a_rate_of_zero_makes_no_bias():
    gate = GATES.build("sigmoid", {}, num_experts=4, top_k=2, in_features=3)
    assert gate.state_dict() == {}
    gate.after_step(0.5)
    gate = GATES.build("sigmoid", {"update_rate": 1e-3}, num_experts=4, top_k=2, in_features=3)
    assert list(gate.state_dict()) == ["bias.steps"]


@pytest.mark.parametrize("gate", ["uniform", "stochastic", "fixed"])
@pytest.mark.parametrize("losses", [{}, {"z_loss": 1e-2}])  # of logits that nobody reads
def test_weights_that_no_logit_changes_need_no_router(gate: str, losses: dict[str, float]):
    options = {"weights": [0.3, 0.7]} if gate == "fixed" else {}
    fields = {"gate": gate, "gate_options": options, "num_experts": 2}
    with pytest.raises(
        ValueError, match="router='linear' would learn nothing; use router='random'"
    ):
        MoloraConfig(**fields, losses=losses)
    assert MoloraConfig(**fields, router="random").gate == gate
