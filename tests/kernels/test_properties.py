"""What must hold whatever the shapes: properties of a mixture of low-rank experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_kernels import routed_lora
from molora_kernels.reference import routed_lora_reference

few = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def mixtures(draw):
    """(operands, ranks, always_on, dispatch options) in fp64, gates with exact zeros."""
    ranks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    always_on = draw(st.integers(0, 3))
    T, d_in, d_out = draw(st.integers(0, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dispatch = draw(st.sampled_from([{}, {"active": len(ranks), "dispatch": "grouped"}]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    columns = sum(ranks) + always_on

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x": normal(T, d_in),
        "A": normal(columns, d_in),
        "B": normal(d_out, columns),
        "gate": normal(T, len(ranks)).relu(),
        "out": normal(T, d_out),
    }
    return tensors, ranks, always_on, dispatch


def call(tensors, ranks, always_on, options=None, function=routed_lora):
    tensors = {name: t.clone() for name, t in tensors.items()}
    return function(**tensors, ranks=ranks, always_on=always_on, **(options or {}))


def experts(A, ranks, always_on):
    return A.split([*ranks, *([always_on] if always_on else [])])


@few
@given(mixtures())
def test_equals_the_reference(mixture):
    tensors, ranks, always_on, options = mixture
    expected = call(tensors, ranks, always_on, function=routed_lora_reference)
    torch.testing.assert_close(call(tensors, ranks, always_on, options), expected)


@few
@given(mixtures())
def test_one_expert_with_gate_one_is_plain_lora(mixture):
    tensors, ranks, always_on, options = mixture
    R = sum(ranks) + always_on
    tensors["gate"] = torch.ones(tensors["x"].shape[0], 1, dtype=torch.float64)
    options = options | {"active": 1}
    plain = tensors["out"] + tensors["x"] @ tensors["A"].T @ tensors["B"].T
    torch.testing.assert_close(call(tensors, [R], 0, options), plain)


@few
@given(mixtures(), st.randoms(use_true_random=False))
def test_the_order_of_experts_does_not_matter(mixture, random):
    tensors, ranks, always_on, options = mixture
    order = list(range(len(ranks)))
    random.shuffle(order)
    parts = {
        "A": experts(tensors["A"], ranks, always_on),
        "B": experts(tensors["B"].T, ranks, always_on),
    }
    shuffled = {
        name: torch.cat([*(part[e] for e in order), *part[len(ranks) :]])
        for name, part in parts.items()
    }
    permuted = tensors | {
        "A": shuffled["A"],
        "B": shuffled["B"].T,
        "gate": tensors["gate"][:, order],
    }
    expected = call(tensors, ranks, always_on, options)
    got = call(permuted, [ranks[e] for e in order], always_on, options)
    torch.testing.assert_close(got, expected)


@few
@given(mixtures())
def test_a_zero_gate_leaves_the_base(mixture):
    tensors, ranks, always_on, options = mixture
    tensors["gate"].zero_()
    tensors["B"][:, sum(ranks) :] = 0
    assert torch.equal(call(tensors, ranks, always_on, options), tensors["out"])


@few
@given(mixtures(), st.integers(0, 9))
def test_tokens_are_independent(mixture, cut):
    tensors, ranks, always_on, options = mixture
    halves = [
        {n: t if n in ("A", "B") else t[part] for n, t in tensors.items()}
        for part in (slice(None, cut), slice(cut, None))
    ]
    got = torch.cat([call(half, ranks, always_on, options) for half in halves])
    torch.testing.assert_close(got, call(tensors, ranks, always_on, options))


@pytest.mark.parametrize("tied", ["A", "B"])
@few
@given(mixture=mixtures(), rank=st.integers(1, 4))
def test_a_tied_factor_equals_its_copies(tied, mixture, rank):
    tensors, ranks, always_on, _ = mixture
    E, (T, d_in), d_out = len(ranks), tensors["x"].shape, tensors["out"].shape[1]
    generator = torch.Generator().manual_seed(T)
    sizes = {"A": E * rank, "B": E * rank} | {tied: rank}
    A, B = (
        torch.randn(sizes[n], d, generator=generator, dtype=torch.float64)
        for n, d in (("A", d_in), ("B", d_out))
    )
    copied = {"A": A.repeat(E, 1)} if tied == "A" else {"B": B.repeat(E, 1)}
    full = {"A": A, "B": B} | copied
    base = {n: tensors[n] for n in ("x", "gate", "out")}
    expected = call(base | {"A": full["A"], "B": full["B"].T}, [rank] * E, 0)
    got = call(base | {"A": A, "B": B.T}, [rank] * E, 0, {"tied": tied})
    torch.testing.assert_close(got, expected)
