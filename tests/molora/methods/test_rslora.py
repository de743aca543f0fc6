"""rsLoRA against its formula."""

from molora import MoloraConfig


def formula(site):
    A, B = site.p["experts.A"], site.p["experts.B"]
    return site.base() + 16 / len(A) ** 0.5 * (site.x @ A.T @ B.T)


def test_formula(fidelity):
    fidelity(MoloraConfig.from_method("rslora", r=[2, 3])).check(formula)
