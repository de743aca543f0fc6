"""StableMoE from its formula, before and after its router is frozen."""

import pytest
import torch

from molora import MoloraConfig, after_step
from molora.gates import GATES


def formula(site):
    z = site.x @ site.p["router.weight"].T
    frozen = bool(site.buffers["gate.frozen"])
    where = "buffers" if frozen else "p"
    names = ("gate.fixed_down", "gate.fixed_up") if frozen else ("gate.down", "gate.up")
    P, D = (getattr(site, where)[name] for name in names)
    distilled = site.x.detach() @ P.T @ D.T
    teacher = [max(range(len(row)), key=row.__getitem__) for row in z.tolist()]
    student = [max(range(len(row)), key=row.__getitem__) for row in distilled.tolist()]
    chosen = teacher if site.training and not frozen else student
    weights = torch.zeros_like(z)
    balance, taught = 0, 0
    real = site.mask.nonzero().flatten().tolist()
    experts = z.shape[1]
    for t, e in enumerate(chosen):
        weights[t, e] = 1 / (1 + torch.exp(-z[t, e]))
    for e in range(experts):
        mine = [t for t in real if chosen[t] == e]
        mean = len(real) / experts
        balance = balance + (len(mine) - mean) / mean * sum(weights[t, e] for t in mine)
    for t in real:
        taught = taught - distilled[t].log_softmax(-1)[teacher[t]]
    zero = torch.zeros((), dtype=z.dtype)
    return site.mix(weights), {
        "assignment_balancing": zero if frozen else balance / len(real),
        "distillation": zero if frozen else taught / len(real),
    }


def test_formula_in_both_stages(fidelity):
    config = MoloraConfig.from_method(
        "stablemoe",
        num_experts=[5, 4],
        r=[2, 3],
        gate_options={"distilled_dim": 3, "freeze_after": 0.25},
    )
    case = fidelity(config)
    case.check(formula)
    case.check(formula, train=False)
    after_step(case.model, 0.2)
    case.check(formula)
    after_step(case.model, 0.25)
    case.check(formula, train=False)
    for layer in case.layers().values():
        gate = layer.molora_gate["default"]
        for parameter in (gate.down, gate.up):  # as an optimizer's momentum might
            parameter.data.neg_()
    after_step(case.model, 0.3)
    case.check(formula)
    case.check(formula, train=False)


def test_without_progress_it_keeps_learning():
    gate = GATES.build("distilled", {}, num_experts=3, top_k=1, in_features=2)
    gate.after_step(None)
    assert not gate.frozen
    gate.after_step(0.1)
    assert gate.frozen and torch.equal(gate.fixed_up, gate.up)


@pytest.mark.parametrize("loss", ["distillation", "assignment_balancing"])
def test_the_losses_need_this_gate(loss):
    with pytest.raises(ValueError, match=f"'{loss}' reads .* use gate='distilled', or drop"):
        MoloraConfig.from_method("mola", losses={loss: 1.0})


def test_the_second_router_needs_its_loss():
    # it decides at inference, and would stay as it was drawn
    with pytest.raises(ValueError, match="the loss 'distillation' alone trains"):
        MoloraConfig.from_method("stablemoe", losses={"assignment_balancing": 0.3})


@pytest.mark.parametrize(("option", "bad"), [("distilled_dim", 0), ("freeze_after", 1.5)])
def test_options_out_of_range(option, bad):
    with pytest.raises(ValueError, match=f"{option}={bad}"):
        MoloraConfig(gate="distilled", gate_options={option: bad})
