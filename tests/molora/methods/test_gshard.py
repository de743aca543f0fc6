"""GShard from its formula, the drawn second expert included."""

import torch

from molora import MoloraConfig
from molora.gates import GATES
from molora.routing import SiteInput


def formula(site):
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    drawn = torch.rand(len(probs), 1, dtype=torch.float64) if site.training else None
    weights = torch.zeros_like(probs)
    for t, row in enumerate(probs):
        first, second = row.topk(2).indices
        total = row[first] + row[second]
        weights[t, first] = row[first] / total
        if drawn is None or drawn[t] < 2 * row[second] / total:
            weights[t, second] = row[second] / total
    first = torch.eye(probs.shape[1], dtype=torch.float64)[probs.argmax(-1)]
    loss = probs.shape[1] * (site.token_mean(first) * site.token_mean(probs)).sum()
    return site.mix(weights), {"load_balancing": loss}


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("gshard", num_experts=[3, 4], r=[2, 3]))
    case.check(formula)
    case.check(formula, train=False)


def test_how_often_the_second_is_used():
    gate = GATES.build("gshard", {}, num_experts=3, top_k=2, in_features=1)
    logits = torch.tensor([0.0, 2.0, 0.5]).log().clamp(min=-30).expand(4000, 3)
    torch.manual_seed(0)
    weights = gate(logits, SiteInput(hidden=torch.zeros(4000, 1))).weights
    torch.testing.assert_close(weights[:, 1], torch.full((4000,), 0.8))
    assert weights[:, 2].unique().tolist() == [0.0, torch.tensor(0.2).item()]
    # 2 g_2 = 0.4, with a deviation of sqrt(0.4 * 0.6 / 4000) < 0.008
    assert abs((weights[:, 2] > 0).float().mean() - 0.4) < 0.04
