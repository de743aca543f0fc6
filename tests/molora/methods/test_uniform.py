"""The uniform mixture against the mean of its experts."""

from molora import MoloraConfig


def formula(site):
    outputs = site.outputs()
    return site.base() + sum(outputs) / len(outputs)


def test_formula(fidelity):
    fidelity(MoloraConfig.from_method("uniform", num_experts=[3, 4], r=[2, 3])).check(formula)
