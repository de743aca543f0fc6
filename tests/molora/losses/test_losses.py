"""Every loss against its formula in fp64, its gradient, and that padding never counts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molora.gates import GATES
from molora.losses import LOSSES
from molora.routing import Routing, SiteInput

NAMES = ["load_balancing", "z_loss"]
every_loss = pytest.mark.parametrize("name", NAMES)


def compute(name: str, routing: Routing) -> Tensor:
    inputs = SiteInput(hidden=torch.zeros(len(routing.weights), 1), mask=routing.mask)
    return LOSSES.build(name, {})(routing, inputs)


def decide(logits: Tensor, mask: Tensor | None = None, gate: str = "top_k", k: int = 2) -> Routing:
    built = GATES.build(gate, {}, num_experts=logits.shape[-1], top_k=k, in_features=1)
    return built(logits, SiteInput(hidden=torch.zeros(len(logits), 1))).with_mask(mask)


def some_logits(tokens: int = 7, experts: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, dtype=torch.float64, generator=generator)


def real_tokens(routing: Routing) -> list[int]:
    mask = routing.mask
    return [t for t in range(len(routing.weights)) if mask is None or mask[t]]


def load_balancing(routing: Routing) -> float:
    """E / k times the sum over experts of f P."""
    tokens, experts = real_tokens(routing), routing.num_experts
    if not tokens:
        return 0.0
    used = [sum(float(routing.weights[t, e] != 0) for t in tokens) for e in range(experts)]
    mass = [sum(routing.probs[t, e].item() for t in tokens) for e in range(experts)]
    k = sum(used) / len(tokens)
    products = [u / len(tokens) * m / len(tokens) for u, m in zip(used, mass, strict=True)]
    return experts / k * sum(products) if k else 0.0


def z_loss(routing: Routing) -> float:
    tokens = real_tokens(routing)
    sums = [sum(math.exp(z) for z in routing.logits[t].tolist()) for t in tokens]
    return sum(math.log(s) ** 2 for s in sums) / max(len(tokens), 1)


FORMULAS = {"load_balancing": load_balancing, "z_loss": z_loss}
masks = st.lists(st.booleans(), min_size=7, max_size=7)


@every_loss
@pytest.mark.parametrize("gate", ["top_k", "top_k_unnormalized", "switch", "sigmoid", "top_p"])
@pytest.mark.parametrize("mask", [None, [1, 1, 0, 1, 0, 0, 1], [0] * 7], ids=["all", "some", "no"])
def test_the_loss_is_its_formula(name, gate, mask):
    mask = None if mask is None else torch.tensor(mask).bool()
    routing = decide(some_logits(), mask, gate)
    result = compute(name, routing)
    assert result.shape == () and result.dtype == torch.float64
    assert result.item() == pytest.approx(FORMULAS[name](routing), rel=1e-12)


@every_loss
@given(mask=masks, seed=st.integers(0, 99))
def test_padding_is_as_if_it_were_not_there(name, mask, seed):
    mask = torch.tensor(mask)
    logits = some_logits(seed=seed).requires_grad_()
    masked = compute(name, decide(logits, mask))
    (gradient,) = torch.autograd.grad(masked, logits)
    assert not gradient[~mask].any()
    if mask.any():
        alone = logits.detach()[mask].requires_grad_()
        without = compute(name, decide(alone))
        assert masked.item() == pytest.approx(without.item(), rel=1e-12)
        torch.testing.assert_close(gradient[mask], torch.autograd.grad(without, alone)[0])
    else:
        assert masked.item() == 0.0


@every_loss
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_the_order_of_the_experts_changes_nothing(name, order, seed):
    logits = some_logits(seed=seed)
    permuted = compute(name, decide(logits[:, order])).item()
    assert permuted == pytest.approx(compute(name, decide(logits)).item(), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 20.0])
def test_load_balancing_is_one_at_perfect_balance_for_every_k(k, sharpness):
    experts = 5
    # token t prefers experts t, t+1, ...: over all tokens every expert is used and likely alike
    slopes = -sharpness * torch.arange(experts, dtype=torch.float64)
    logits = torch.stack([slopes.roll(t) for t in range(experts)])
    routing = decide(logits, k=k, gate="top_k_unnormalized")
    assert routing.selected.sum(0).tolist() == [k] * experts
    assert compute("load_balancing", routing).item() == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(("k", "experts"), [(1, 4), (2, 4), (2, 8)])
def test_load_balancing_of_a_total_collapse_is_experts_over_k(k, experts):
    logits = torch.zeros(6, experts, dtype=torch.float64)
    logits[:, :k] = 60.0
    loss = compute("load_balancing", decide(logits, k=k, gate="top_k_unnormalized"))
    assert loss.item() == pytest.approx(experts / k, rel=1e-9)


def test_the_gradient_of_load_balancing_flows_through_the_probabilities_alone():
    logits = some_logits()
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool()
    decided = decide(logits, mask)
    parts = [t.detach().requires_grad_() for t in (decided.weights, decided.logits, decided.probs)]
    loss = compute("load_balancing", Routing(*parts, mask))
    weights, raw, probs = torch.autograd.grad(loss, parts, allow_unused=True)
    assert weights is None and raw is None
    share = decided.selected[mask].double().mean(0)
    expected = mask[:, None] * (4 / share.sum() * share / mask.sum())
    torch.testing.assert_close(probs, expected, rtol=1e-12, atol=0)


def test_a_step_against_the_gradient_of_load_balancing_makes_the_crowded_expert_less_likely():
    logits = torch.tensor([[2.0, 0.0, -1.0]] * 4, dtype=torch.float64, requires_grad=True)
    compute("load_balancing", decide(logits, gate="switch", k=1)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_the_gradient_of_the_z_loss_is_the_analytic_one():
    logits = some_logits().requires_grad_()
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()
    compute("z_loss", decide(logits, mask)).backward()
    log_sum = logits.detach().exp().sum(-1, keepdim=True).log()
    expected = 2 * log_sum * (logits.detach() - log_sum).exp() * mask[:, None] / mask.sum()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)


@every_loss
def test_no_tokens_and_no_selection_give_finite_losses(name):
    assert compute(name, decide(some_logits(tokens=0))).item() == 0.0
    logits = some_logits().requires_grad_()
    nobody = Routing(torch.zeros(7, 4, dtype=torch.float64), logits, logits.softmax(-1))
    loss = compute(name, nobody)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_what_needs_a_sparse_gate_is_constant_with_a_dense_one():
    dense = [decide(some_logits(seed=seed), gate="dense") for seed in (0, 1)]
    constant = {
        name
        for name in NAMES
        if math.isclose(compute(name, dense[0]).item(), compute(name, dense[1]).item())
    }
    assert constant == {name for name in NAMES if LOSSES.get(name).needs_sparse_gate}
