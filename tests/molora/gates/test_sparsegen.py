"""The gate's own settings; its formula is tested with LD-MoLE."""

from molora.gates import GATES


def test_the_bias_may_be_a_whole_number():
    gate = GATES.build("sparsegen", {"bias": -2}, num_experts=3, top_k=None, in_features=4)
    assert gate.bias_2.dtype.is_floating_point and gate.bias_2.tolist() == [-2.0]
