"""HydraLoRA from its formula."""

from molora import MoloraConfig


def formula(site):
    A, r = site.p["experts.A"], site.ranks[0]
    assert A.shape[0] == r
    weights = (site.x @ site.p["router.weight"].T).softmax(-1)
    y = site.base()
    for e, B in enumerate(site.p["experts.B"].split(r, 1)):
        y = y + weights[:, e, None] * (32 / r) * (site.x @ A.T @ B.T)
    return y


def test_formula(fidelity):
    config = MoloraConfig.from_method("hydralora", num_experts=[4, 2], r=[2, 3], lora_dropout=0.0)
    fidelity(config).check(formula)
