"""SparseMixer-v2: inference from its formula; in training, its distribution and its gradient."""

import torch

from molora import MoloraConfig, SiteInput
from molora.gates import GATES


def masked(z, taken):
    """The logits near the largest one that isn't taken, the others at -infinity."""
    open_ones = [e for e in range(len(z)) if e not in taken]
    top = max(z[e] for e in open_ones)
    near = [e for e in open_ones if (top - z[e]) <= 2 * 0.01 * max(abs(z[e]), top)]
    return torch.stack([z[e] if e in near else z[e] - torch.inf for e in range(len(z))])


def formula(site):
    z = site.x @ site.p["router.weight"].T
    rows = []
    for row in z:
        first = masked(row, []).softmax(-1)
        e1 = int(row.argmax())
        second = masked(row, [e1]).softmax(-1)
        e2 = int(second.argmax())
        chosen = torch.zeros_like(row)
        rows.append(
            chosen.scatter(0, torch.tensor(e1), first[e1]).scatter(0, torch.tensor(e2), second[e2])
        )
    return site.mix(torch.stack(rows))


def test_inference_follows_the_formula(fidelity):
    config = MoloraConfig.from_method("sparsemixer", num_experts=[5, 4], r=[2, 3])
    fidelity(config).check(formula, train=False)


def build():
    return GATES.build(
        "sparse_mixer", {"jitter": 0.2}, num_experts=3, top_k=2, in_features=1
    ).double()


def test_training_draws_from_the_masked_softmax():
    # The third expert lies outside: (2 - 0.5) > 2 * 0.2 * 2. Within the mask: softmax(2, 1.5).
    logits = torch.tensor([[2.0, 1.5, 0.5]], dtype=torch.float64).expand(20_000, 3)
    torch.manual_seed(0)
    weights = build().train()(logits, SiteInput(torch.zeros(20_000, 1))).weights
    p = torch.tensor([2.0, 1.5], dtype=torch.float64).softmax(-1)
    assert (weights != 0).sum(-1).eq(2).all()
    # Where the second expert, which isn't the best, was drawn first, it weighs p_2, or a third of
    # it in 3 cases of 4; where it came second it was alone in its mask and weighs 1.
    small = torch.isclose(weights[:, 1], p[1] / 3)
    full = torch.isclose(weights[:, 1], p[1])
    assert abs(float((small | full).double().mean()) - float(p[1])) < 0.02
    assert abs(float(small.double().mean()) - 0.75 * float(p[1])) < 0.02


def test_the_gradient_is_that_of_the_probability_in_either_case():
    logits = torch.tensor([[2.0, 1.5, 0.5]], dtype=torch.float64)
    gate = build().train()
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        z = logits.clone().requires_grad_()
        weights = gate(z, SiteInput(torch.zeros(1, 1))).weights
        p = logits[0, :2].softmax(-1)
        for factor in (1.0, 1 / 3):
            if torch.isclose(weights[0, 1], factor * p[1]):
                (grad,) = torch.autograd.grad(weights[0, 1], z)
                expected = torch.tensor([-p[0] * p[1], p[1] * (1 - p[1]), 0.0])
                torch.testing.assert_close(grad[0], expected.double())
                seen.add(factor)
    assert seen == {1.0, 1 / 3}
