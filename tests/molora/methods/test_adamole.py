"""AdaMoLE from its formula, threshold and loss included."""

import pytest
import torch

from molora import MoloraConfig
from molora.gates import GATES
from molora.routing import SiteInput

TARGETS = ["o_proj", "up_proj"]


def formula(site):
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    experts = probs.shape[1]
    height = site.x @ site.p["gate.threshold.weight"].T + site.p["gate.threshold.bias"]
    margins = probs - 1 / experts / (1 + (-height).exp())
    above = margins * (margins > 0)
    share = site.token_mean((margins > 0).double())
    loss = experts / share.sum() * (share * site.token_mean(margins)).sum()
    return site.mix(above / above.sum(-1, keepdim=True)), {"load_balancing": loss}


def config(**overrides) -> MoloraConfig:
    options = {"num_experts": [3, 5], "r": [2, 3], "lora_dropout": 0.0, "target_modules": TARGETS}
    return MoloraConfig.from_method("adamole", **{**options, **overrides})


def test_formula(fidelity):
    case = fidelity(config())
    case.check(formula)
    case.check(formula, train=False)


def test_at_least_one_expert_up_to_a_threshold_of_one_over_e():
    gate = GATES.build("learned_threshold", {}, num_experts=4, top_k=None, in_features=3)
    gate.threshold.bias.data.fill_(20.0)  # tau = 1/E up to rounding
    logits = torch.tensor([[0.0, 0, 0, 0], [0, 1e-3, 0, 0], [9, 0, 0, 0]], dtype=torch.float64)
    gate.double()
    weights = gate(logits, SiteInput(hidden=torch.zeros(3, 3, dtype=torch.float64))).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))


def test_a_higher_threshold_may_select_nothing():
    options = {"max_threshold": 1.0}
    gate = GATES.build("learned_threshold", options, num_experts=4, top_k=None, in_features=3)
    gate.threshold.bias.data.fill_(3.0)
    routing = gate(torch.zeros(2, 4), SiteInput(hidden=torch.zeros(2, 3)))
    assert (routing.weights == 0).all()


def test_the_loss_wants_the_gate_with_a_threshold():
    losses = {"load_balancing": {"coefficient": 0.1, "above_threshold": True}}
    with pytest.raises(ValueError, match="use gate='learned_threshold', or drop the loss"):
        MoloraConfig(gate="switch", losses=losses)
