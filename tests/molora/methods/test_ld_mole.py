"""LD-MoLE from its formula and from the problem that sparsegen solves."""

import pytest
import torch

from molora import MoloraConfig
from molora.gates import GATES
from molora.routing import SiteInput


def sparsegen(z, sparsity):
    """One token: the threshold by trying every size of the support."""
    ordered = z.sort(descending=True).values
    for k in range(len(z), 0, -1):
        if 1 - sparsity + k * ordered[k - 1] > ordered[:k].sum():
            tau = (ordered[:k].sum() - 1 + sparsity) / k
            return torch.relu(z - tau) / (1 - sparsity)
    raise AssertionError("no support fits")


def sparsity_of(site):
    p = {name: site.p[f"gate.{name}"] for name in ("weight_1", "bias_1", "weight_2", "bias_2")}
    inner = torch.relu(site.x @ p["weight_1"].T + p["bias_1"])
    score = (inner @ p["weight_2"].T + p["bias_2"]).squeeze(-1)
    return torch.log(1 / (1 + torch.exp(-score))) + 0.9


def formula(site):
    z, sparsity = site.x @ site.p["router.weight"].T, sparsity_of(site)
    w = torch.stack([sparsegen(*token) for token in zip(z, sparsity, strict=True)])
    active = (w > 0).double()[site.mask]
    assert len(active.sum(-1).unique()) > 1
    share = active.sum(0) / active.sum()
    floor = torch.stack([1 - sum(top[i] - top[2] for i in (0, 1)) for top in z.topk(3).values])
    losses = {
        "load_balancing": z.shape[1] * (share * site.token_mean(w)).sum(),
        "z_loss": site.token_mean(z.exp().sum(-1).log().pow(2)),
        "sparsity_budget": site.token_mean((floor.detach() - sparsity).clamp(min=0)),
        "sparsity_slack": site.token_mean(1 - sparsity),
    }
    return site.mix(w), losses


def test_formula(fidelity):
    config = MoloraConfig.from_method(
        "ld-mole",
        num_experts=[5, 3],
        r=[2, 3],
        lora_dropout=0.0,
        gate_options={"hidden_size": 7, "eps": 0.1},
        losses={
            "load_balancing": 0.4,
            "z_loss": 0.2,
            "sparsity_budget": 0.3,
            "sparsity_slack": 0.1,
        },
    )
    fidelity(config).check(formula)


def gate(sparsity: float, num_experts: int = 6):
    """A gate whose lambda is that for every token."""
    built = GATES.build(
        "sparsegen",
        {"hidden_size": 2, "eps": 1e-2},
        num_experts=num_experts,
        top_k=None,
        in_features=3,
    )
    score = torch.logit(torch.tensor(sparsity - 0.99).exp().double())
    built.weight_2.data.zero_()
    built.bias_2.data.fill_(float(score))
    return built.double()


@pytest.mark.parametrize("sparsity", [0.98, 0.5, 0.0, -3.0])
def test_the_weights_solve_the_problem(sparsity: float):
    torch.manual_seed(0)
    z = torch.randn(20, 6).double()
    routing = gate(sparsity)(z, SiteInput(torch.randn(20, 3).double()))
    w = routing.weights
    torch.testing.assert_close(routing.extras["sparsity"], torch.full((20,), sparsity).double())
    torch.testing.assert_close(w.sum(-1), torch.ones(20).double())
    # no other point of the simplex is better: not any vertex, and not any point nearby
    objective = lambda w: (w - z).square().sum(-1) - sparsity * w.square().sum(-1)  # noqa: E731
    for other in [*torch.eye(6).double(), *torch.rand(30, 6).double().softmax(-1)]:
        for step in (0.01, 1.0):
            assert (objective(w + step * (other - w)) >= objective(w) - 1e-12).all()


def test_from_one_expert_to_all():
    torch.manual_seed(0)
    z, x = torch.randn(50, 6).double(), SiteInput(torch.randn(50, 3).double())
    counts = [gate(s)(z, x).selected.sum(-1).double().mean() for s in (0.989, 0.5, -1.0, -30.0)]
    assert counts[0] < 1.1 and counts == sorted(counts) and counts[-1] == 6


def test_equal_logits_are_shared_out_equally():
    z = torch.zeros(2, 6).double()
    weights = gate(0.9)(z, SiteInput(torch.randn(2, 3).double())).weights
    torch.testing.assert_close(weights, torch.full((2, 6), 1 / 6).double())


@pytest.mark.parametrize("loss", ["sparsity_budget", "sparsity_slack"])
def test_the_losses_need_this_gate(loss: str):
    with pytest.raises(ValueError, match=f"'{loss}' reads .* use gate='sparsegen', or drop"):
        MoloraConfig.from_method("mola", losses={loss: 1.0})


def test_a_budget_of_all_experts_costs_nothing(fidelity):
    config = MoloraConfig.from_method(
        "ld-mole",
        num_experts=3,
        lora_dropout=0.0,
        losses={"sparsity_budget": {"coefficient": 1.0, "active": 3}},
    )
    losses = fidelity(config).run().losses
    assert losses and all(terms["sparsity_budget"] == 0 for terms in losses.values())
