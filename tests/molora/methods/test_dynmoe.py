"""DynMoE from its formula, and the experts that come and go between optimizer steps."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from molora import MoloraConfig, SiteInput, after_step
from molora.gates import GATES
from molora.layer import MoloraLayer
from molora.routers import ROUTERS


def formula(site):
    W, G, active = site.p["router.weight"], site.p["gate.thresholds"], site.buffers["gate.active"]
    cos = (site.x / site.x.norm(dim=-1, keepdim=True)) @ (W / W.norm(dim=-1, keepdim=True)).T
    s = 1 / (1 + torch.exp(-math.e * cos)) * active
    t = 1 / (1 + torch.exp(-math.e * G))
    g = (s > t).double()
    through = g + (s - t - (s - t).detach()) * g
    weights = through / g.sum(-1, keepdim=True).clamp(min=1)
    if not site.training:
        for i in range(len(g)):
            if g[i].sum() == 0:
                weights = weights.clone()
                weights[i, s[i].argmax()] = 1.0
    real = site.mask & (g.sum(-1) > 0)
    experts = len(G)
    V = (W / W.norm(dim=-1, keepdim=True))[active]
    losses = {
        "simplicity_diversity": (V @ V.T - torch.eye(len(V))).norm() + W[active].norm(dim=1).mean(),
        "efficiency": experts**2 * (s[real].mean(0) * g[real].mean(0)).mean()
        + through[site.mask].mean(),
    }
    site.memory.setdefault("used", []).append(g.sum(-1))
    if site.name == "layers.1.down_proj":
        assert {0.0, 1.0, 2.0} <= set(torch.cat(site.memory["used"]).tolist())
    return site.mix(weights), losses


def test_formula(fidelity):
    config = MoloraConfig.from_method(
        "dynmoe",
        num_experts=[5, 4],
        r=[2, 3],
        gate_options={"initial_experts": 3},
        losses={"simplicity_diversity": 0.3, "efficiency": 0.2},
    )
    case = fidelity(config)
    case.check(formula)
    case.check(formula, train=False)


def parts(experts=4, **options):
    """A gate and a router whose rows are the axes."""
    gate = GATES.build("expert_thresholds", options, num_experts=experts, top_k=None, in_features=4)
    router = ROUTERS.build("cosine", {}, in_features=4, num_experts=experts)
    router.weight.data = torch.eye(experts, 4)
    return gate, router


def run(gate, router, rows, mask=None):
    inputs = SiteInput(torch.tensor(rows, dtype=torch.float32), mask=mask, router=router)
    return gate(router(inputs), inputs)


def test_idle_experts_go_and_one_comes_for_tokens_without_any():
    gate, router = parts(initial_experts=3, period=2)
    gate.thresholds.data.fill_(0.1)
    for row in ([1.0, 0, 0, 0], [0, 2.0, 0, 0]):  # the third is for nobody, the fourth is off
        run(gate, router, [row, [0, 0, 0, 3.0]])
        run(gate, router, [[0, 0, 1.0, 0]], mask=torch.tensor([False]))
        assert gate.active.tolist() == [True, True, True, False]
        gate.after_step(None)
    assert gate.active.tolist() == [True, True, True, False]  # one went, its slot is used again
    assert router.weight.tolist()[2] == [0, 0, 0, 1]
    torch.testing.assert_close(gate.thresholds, torch.tensor([0.1, 0.1, 0.0, 0.1]))
    assert gate.counts.sum() == 0 and gate.missed.sum() == 0


def test_the_pool_shrinks_but_one_expert_stays():
    gate, router = parts(period=1)
    run(gate, router, [[1.0, 1.0, 0, 0]])
    gate.after_step(None)
    assert gate.active.tolist() == [True, True, False, False]
    gate.thresholds.data.fill_(9.0)
    run(gate, router, [[0.0, 0, 0, 0]])  # nobody's, and without a direction for a new expert
    gate.after_step(None)
    assert gate.active.tolist() == [True, True, False, False]


def test_a_token_without_expert_uses_none_in_training_and_the_best_at_inference():
    gate, router = parts(initial_experts=2)
    gate.thresholds.data.fill_(9.0)
    rows = [[0.5, 1.0, 9.0, 0]]
    assert run(gate, router, rows).weights.tolist() == [[0, 0, 0, 0]]
    assert run(gate.eval(), router, rows).weights.tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_pass_counts_once_and_evaluation_never(reentrant):
    gate, router = parts(period=5)
    x = torch.tensor([[1.0, 0, 0, 0], [-1, -1, -1, -1]], requires_grad=True)

    def forward(x):
        inputs = SiteInput(x, router=router)
        return gate(router(inputs), inputs).weights

    checkpoint(forward, x, use_reentrant=reentrant).sum().backward()
    gate.eval()
    forward(x)
    gate.after_step(None)
    assert gate.counts.tolist() == [1, 0, 0, 0]
    assert gate.missed.tolist() == [-1] * 4 and gate.steps.item() == 1


def test_a_compiled_gate_counts_too():
    gate, router = parts(period=1)
    x = torch.tensor([[1.0, 0, 0, 0], [-1, -1, -1, -1]])
    inputs = SiteInput(x, router=router)
    compiled = torch.compile(gate, backend="eager", fullgraph=True)
    routing = compiled(router(inputs).detach(), inputs)
    assert routing.weights.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    gate.after_step(None)
    assert gate.active.tolist() == [True, True, False, False]
    torch.testing.assert_close(router.weight[1], torch.full((4,), -0.5))


def test_changes_are_saved_and_a_cast_does_not_stop_the_counting():
    gate, router = parts(period=1)
    gate.to(torch.bfloat16)
    run(gate, router, [[1.0, 0, 0, 0]])
    gate.after_step(None)
    other, _ = parts(period=1)
    other.load_state_dict(gate.state_dict())
    assert other.active.tolist() == [True, False, False, False]


def test_a_model_grows_after_the_step_alone(fidelity):
    config = MoloraConfig.from_method(
        "dynmoe", num_experts=4, gate_options={"initial_experts": 1, "period": 1}
    )
    case = fidelity(config)
    gates = [layer.molora_gate["default"] for layer in case.model.modules()
             if isinstance(layer, MoloraLayer)]  # fmt: skip
    case.run()
    assert {gate.active.sum().item() for gate in gates} == {1}
    after_step(case.model)
    assert 2 in {gate.active.sum().item() for gate in gates}


def test_what_it_needs_is_named():
    with pytest.raises(ValueError, match="gate='expert_thresholds'"):
        MoloraConfig.from_method("mola", losses={"efficiency": 1.0})
    for option in ("period", "initial_experts", "scale"):
        with pytest.raises(ValueError, match=f"{option}=0"):
            MoloraConfig(gate="expert_thresholds", gate_options={option: 0})
