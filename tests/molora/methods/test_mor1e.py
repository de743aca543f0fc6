"""MoR1E from its formula, with and without the scores of the instance."""

import pytest
import torch

from molora import MoloraConfig


def gates(site):
    """(T, E) the published gates: token part times 32, instance part times 4."""
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    main = 1 / (1 + torch.exp(-100 * site.p["gate.theta"]))
    if "gate.omega" not in site.p:
        return 32 * main * probs
    own = 1 / (1 + torch.exp(-100 * site.p["gate.omega"]))
    scores = site.labels["instance_scores"][:, None].expand(*site.shape, -1).flatten(0, 1)
    return main * (32 * probs * own + 4 * scores * (1 - own))


def formula(site):
    inner = gates(site) * (site.x @ site.p["experts.A"].T)
    return site.base() + inner @ site.p["experts.B"].T


def with_scores(case, experts: int):
    """The case with instance scores, and with scalars at which sigmoid(100 x) isn't saturated."""
    generator = torch.Generator().manual_seed(5)
    case.labels["instance_scores"] = torch.randn(3, experts, generator=generator).double()
    for layer in case.layers().values():
        for scalar in layer.molora_gate["default"].parameters():
            scalar.data *= 0.05
    return case


@pytest.mark.parametrize("instance", [False, True], ids=["token", "instance"])
def test_formula(fidelity, instance: bool):
    r = 5 if instance else [6, 4]
    config = MoloraConfig.from_method("mor1e", r=r, gate_options={"instance": instance})
    with_scores(fidelity(config), experts=5).check(formula)


def test_the_scores_must_be_there_and_fit(fidelity):
    case = fidelity(MoloraConfig.from_method("mor1e", r=4, gate_options={"instance": True}))
    with pytest.raises(ValueError, match=r"pass instance_scores \(batch, E\)"):
        case.run()
    case.labels["instance_scores"] = torch.zeros(3, 7)
    with pytest.raises(ValueError, match=r"shape \(3, 7\); this site needs \(3, 4\)"):
        case.run()
