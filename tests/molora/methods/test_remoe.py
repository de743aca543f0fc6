"""ReMoE from its formula, and the factor that follows the number of active experts."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import molora
from molora import MoloraConfig
from molora.gates import GATES
from molora.routing import SiteInput


def formula(site):
    z = site.x @ site.p["router.weight"].T
    w = torch.where(z > 0, z, 0.0)
    E = len(site.ranks)
    real = w[site.mask]
    factor = 1e-8 * 1.2 ** int(site.buffers["gate.steps"])
    penalty = 0
    for e in range(E):
        share = (real[:, e] > 0).double().mean()
        penalty = penalty + E / 2 * share * real[:, e].mean()
    return site.mix(w), {"relu_sparsity": factor * penalty}


def test_formula(fidelity):
    config = MoloraConfig.from_method("remoe", num_experts=[4, 3], r=[2, 3])
    case = fidelity(config)
    case.check(formula)
    case.check(formula, train=False)
    for layer in case.layers().values():
        layer.molora_gate["default"].steps.fill_(95)  # lambda 0.33
    case.check(formula)


def gate(**options):
    return GATES.build("relu", options, num_experts=4, top_k=2, in_features=1)


def run(built, positive: int, mask=None, tokens: int = 3) -> None:
    """A pass in which every token has so many positive logits."""
    z = torch.full((tokens, 4), -1.0)
    z[:, :positive] = 1.0
    built(z, SiteInput(z, mask=mask))


def test_the_factor_follows_the_load():
    built = gate(growth=1.5, start=0.1).train()
    for positive in (3, 4):  # more than two
        run(built, positive)
        built.after_step(None)
    assert built.steps == 2 and built.penalty.item() == pytest.approx(0.1 * 1.5**2)
    for positive in (2, 1, 0):  # two or fewer
        run(built, positive)
        built.after_step(None)
    assert built.steps == -1
    built.after_step(None)  # nothing was seen
    assert built.steps == -1
    run(built.eval(), 4)
    built.after_step(None)
    assert built.steps == -1


def test_micro_batches_count_together_and_padding_not_at_all():
    built = gate().train()
    run(built, 4, tokens=1)
    run(built, 1, tokens=3)  # seven uses by four tokens
    built.after_step(None)
    assert built.steps == -1
    run(built, 4, mask=torch.tensor([True, False, False]))
    run(built, 1, mask=torch.tensor([True, False, False]))  # five by two
    built.after_step(None)
    assert built.steps == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_pass_is_counted_once(reentrant: bool):
    built = gate().train()
    z = torch.randn(6, 4, requires_grad=True)
    weights = checkpoint(lambda z: built(z, SiteInput(z)).weights, z, use_reentrant=reentrant)
    weights.sum().backward()
    assert built._counts.tolist() == [int((z > 0).sum()), 6]


def test_a_penalty_that_grows_makes_training_sparse():
    """A router alone, whose only wish is that its weights stay large."""
    torch.manual_seed(0)
    built = gate(start=1e-2).train()
    loss = molora.losses.LOSSES.build("relu_sparsity", {})
    x = torch.randn(64, 8) + 1
    W = torch.rand(4, 8, requires_grad=True)
    active = []
    for _ in range(400):
        routing = built(x @ W.T, SiteInput(x))
        total = (routing.weights - 1).square().mean() + loss(routing, SiteInput(x))
        (grad,) = torch.autograd.grad(total, W)
        W.data -= 0.1 * grad
        built.after_step(None)
        active.append(float(routing.selected.sum(-1).float().mean()))
    assert active[0] > 3.5
    assert abs(sum(active[-100:]) / 100 - 2) < 0.3


def test_what_does_not_fit():
    for options in ({"start": 0.0}, {"growth": 1.0}):
        with pytest.raises(ValueError, match="must be above"):
            gate(**options)


def test_the_loss_needs_this_gate():
    with pytest.raises(ValueError, match="'relu_sparsity' reads .* use gate='relu', or drop"):
        MoloraConfig.from_method("mola", losses={"relu_sparsity": 1.0})
