"""The balance bias: what is counted, when it moves, and that no cast changes it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from molora.gates import GATES
from molora.gates.balance_bias import BalanceBias
from molora.routing import SiteInput

E = 4


def chosen(*experts: int) -> torch.Tensor:
    """(T, E) bool: token t chose experts[t]."""
    return torch.nn.functional.one_hot(torch.tensor(experts), E).bool()


def test_the_used_sink_and_the_unused_rise():
    bias = BalanceBias(E, rate=0.5)
    bias.count(chosen(0, 0, 0, 1, 2), None)
    bias.count(chosen(1, 2, 3), torch.tensor([True, True, False]))
    bias.after_step()  # counts 3, 2, 2, 0; mean 1.75
    assert bias.steps.tolist() == [-1, -1, -1, 1]
    scores = torch.zeros(2, E)
    assert bias(scores).tolist() == [[-0.5, -0.5, -0.5, 0.5]] * 2


def test_at_balance_and_without_counts_it_stays():
    bias = BalanceBias(E, rate=0.5)
    bias.after_step()
    bias.count(chosen(3, 1, 0, 2), None)
    bias.after_step()
    assert bias.steps.tolist() == [0] * E


def test_evaluation_is_not_counted():
    bias = BalanceBias(E, rate=0.5).eval()
    bias.count(chosen(0), None)
    bias.after_step()
    assert bias.steps.tolist() == [0] * E


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_pass_is_counted_once_and_selects_alike(reentrant: bool):
    gate = GATES.build(
        "biased_sigmoid", {"update_rate": 0.5}, num_experts=E, top_k=2, in_features=1
    )
    gate.bias.steps.copy_(torch.tensor([1, 0, 0, -1]))
    z = torch.randn(6, E, requires_grad=True)
    counts = []
    plain = gate(z, SiteInput(z)).weights
    counts.append(gate.bias._counts.clone())
    gate.bias._counts = None
    weights = checkpoint(lambda z: gate(z, SiteInput(z)).weights, z, use_reentrant=reentrant)
    (weights * torch.arange(E)).sum().backward()
    counts.append(gate.bias._counts)
    assert torch.equal(weights, plain)
    assert torch.equal(*counts) and counts[0].sum() == 12


def test_a_cast_to_bf16_keeps_every_step():
    bias = BalanceBias(E, rate=1e-5)
    for _ in range(300):
        bias.count(chosen(0, 1, 2), None)
        bias.after_step()
        bias.to(torch.bfloat16)
    assert bias.steps.tolist() == [-300, -300, -300, 300]


def test_a_negative_rate_is_refused():
    with pytest.raises(ValueError, match="update_rate=-1 must not be negative"):
        GATES.build("indicator", {"update_rate": -1}, num_experts=E, top_k=2, in_features=1)


def test_a_score_that_the_bias_drove_below_zero_weighs_nothing():
    gate = GATES.build(
        "biased_sigmoid", {"update_rate": 1.0}, num_experts=3, top_k=2, in_features=1
    )
    gate.bias.steps.copy_(torch.tensor([0, -2, -3]))
    routing = gate(torch.zeros(1, 3), SiteInput(torch.zeros(1, 1)))
    assert routing.weights.tolist() == [[1.0, 0.0, 0.0]]
    assert routing.probs.sum() == 1


def test_a_compiled_gate_counts_too():
    torch.manual_seed(0)
    gate = GATES.build("indicator", {"update_rate": 0.5}, num_experts=E, top_k=2, in_features=1)
    compiled = torch.compile(gate, backend="eager", fullgraph=True)
    z = torch.randn(6, E)
    for _ in range(2):
        routing = compiled(z, SiteInput(z, mask=torch.arange(6) < 5))
    assert torch.equal(gate.bias._counts, 2 * routing.selected[:5].sum(0))
