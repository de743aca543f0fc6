"""DenseMixer from its formula: y_sparse's value, and for the router the gradient of y_dense."""

import torch

from molora import MoloraConfig


def formula(site):
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    kept = torch.zeros_like(probs)
    for t, row in enumerate(probs.tolist()):
        kept[t, sorted(range(len(row)), key=lambda e: -row[e])[:2]] = 1
    total = (probs * kept).sum(-1, keepdim=True)
    outputs = site.outputs()
    sparse = sum(
        (probs * kept / total).detach()[:, e, None] * output for e, output in enumerate(outputs)
    )
    # The surrogate's value cancels; through it no expert learns, and the router from them all.
    dense = sum(
        (probs / total.detach())[:, e, None] * output.detach() for e, output in enumerate(outputs)
    )
    share = site.token_mean(kept)
    balance = probs.shape[1] / share.sum() * (share * site.token_mean(probs)).sum()
    return site.base() + sparse + dense - dense.detach(), {"load_balancing": balance}


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("densemixer", num_experts=[5, 4], r=[2, 3]))
    case.check(formula)
    case.check(formula, train=False)
