"""DynMoLE from its formula: all experts where the entropy is high, few elsewhere."""

import math
from typing import Any

import pytest
import torch

from molora import MoloraConfig
from molora.gates import GATES
from molora.routing import SiteInput

Q = 1.1


def entropy(row: list[float], q: float) -> float:
    if q == 1:
        return -sum(p * math.log(p) for p in row)
    return (1 - sum(p**q for p in row)) / (q - 1)


def formula(site):
    if not site.parts:
        return site.base() + site.outputs()[0]
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    used, unsure = torch.zeros_like(probs), torch.zeros(len(probs), 1, dtype=torch.bool)
    for t, row in enumerate(probs.tolist()):
        unsure[t] = entropy(row, Q) > 0.9
        mass = 0.0
        for place, e in enumerate(sorted(range(4), key=lambda e: -row[e])):
            if place >= 2 and mass >= 0.75 and not unsure[t]:
                break
            used[t, e], mass = 1, mass + row[e]
    assert unsure.any() and not unsure.all()
    share = site.token_mean(used)
    tsallis = (1 - (probs**Q).sum(-1)) / (Q - 1)
    largest = (1 - 4 ** (1 - Q)) / (Q - 1)
    return site.mix_networks(probs * used / (probs * used).sum(-1, keepdim=True)), {
        "load_balancing": 4 / share.sum() * (share * site.token_mean(probs)).sum(),
        "tsallis_entropy": site.token_mean(tsallis / largest),
    }


def test_formula(fidelity):
    small: dict[str, Any] = {
        "num_experts": {"(gate|up|down)_proj": 4, ".*": 0},
        "target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"],
        "r": 2,
        "lora_dropout": 0.0,
    }
    case = fidelity(MoloraConfig.from_method("dynmole", **small), spread=0.6)
    case.check(formula)
    case.check(formula, train=False)


@pytest.mark.parametrize("q", [1, 1.1, 2])
def test_the_threshold_is_on_the_entropy_itself(q: float):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    at = entropy(logits.softmax(-1)[0].tolist(), q)
    for threshold, used in ((at - 1e-4, 4), (at + 1e-4, 2)):
        options = {"q": q, "threshold": threshold}
        gate = GATES.build("entropy_hybrid", options, num_experts=4, top_k=None, in_features=1)
        routing = gate(logits, SiteInput(torch.zeros(1, 1)))
        assert int(routing.selected.sum()) == used


@pytest.mark.parametrize(
    "options, message",
    [
        ({"q": 0}, "q=0 must be above 0"),
        ({"threshold": -1}, "threshold=-1 must not be negative"),
        ({"p": 0}, "p=0 must be in"),
        ({"min_experts": 0}, "min_experts=0 must be at least 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MoloraConfig(gate="entropy_hybrid", gate_options=options)
