"""Per-layer settings: the named patterns, the lists and the regex maps."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora.settings import SHAPES, check_setting, matches, pattern_values, resolve_setting

SHAPE_NAMES = st.sampled_from(sorted(set(SHAPES) - {"uniform"}))


def accept(name: str, value: object) -> None:
    """A leaf check that takes everything."""


def by_group(pattern: str) -> list[int]:
    """The values of 32 layers, which must be constant over each 8 of them."""
    values = pattern_values("num_experts", pattern, 32)
    groups = [values[i : i + 8] for i in range(0, 32, 8)]
    assert all(len(set(group)) == 1 for group in groups)
    return [group[0] for group in groups]


@pytest.mark.parametrize(
    ("pattern", "published"),
    [
        ("triangle:2-8/4", [8, 6, 4, 2]),
        ("inverted_triangle:2-8/4", [2, 4, 6, 8]),
        ("hourglass:2-8/4", [8, 2, 2, 8]),
        ("uniform:5/4", [5, 5, 5, 5]),
        ("uniform:5", [5, 5, 5, 5]),
        ("diamond:2-8/4", [2, 8, 8, 2]),
    ],
)
def test_the_shapes_of_mola(pattern, published):
    assert by_group(pattern) == published


def exact(shape: str, low: int, high: int, layers: int) -> list[Fraction]:
    """The unrounded values of a pattern without groups, from its definition."""
    heights = []
    for layer in range(layers):
        depth = Fraction(layer, layers - 1)
        from_middle = abs(2 * depth - 1)
        heights.append(
            {
                "triangle": 1 - depth,
                "inverted_triangle": depth,
                "hourglass": from_middle,
                "diamond": 1 - from_middle,
            }[shape]
        )
    least, most = min(heights), max(heights)
    if least == most:
        return [Fraction(high)] * layers
    return [low + (h - least) / (most - least) * (high - low) for h in heights]


@given(SHAPE_NAMES, st.integers(1, 9), st.integers(0, 20), st.integers(2, 60))
def test_a_pattern_without_groups_is_the_exact_line_rounded(shape, low, rise, layers):
    values = pattern_values("r", f"{shape}:{low}-{low + rise}", layers)
    line = exact(shape, low, low + rise, layers)
    assert all(abs(v - x) <= Fraction(1, 2) for v, x in zip(values, line, strict=True))
    assert (min(values), max(values)) == (math.floor(min(line)), math.ceil(max(line)))


@given(st.sampled_from(["hourglass", "diamond"]), st.integers(1, 9), st.integers(2, 60))
def test_symmetric_shapes_read_the_same_from_both_ends(shape, rise, layers):
    values = pattern_values("r", f"{shape}:1-{1 + rise}", layers)
    assert values == values[::-1]


@given(st.integers(1, 9), st.integers(2, 60))
def test_the_triangles_are_each_other_upside_down(rise, layers):
    up = pattern_values("r", f"inverted_triangle:1-{1 + rise}", layers)
    down = pattern_values("r", f"triangle:1-{1 + rise}", layers)
    assert up == sorted(up)
    assert down == up[::-1]


@given(st.integers(2, 12), st.integers(0, 40))
def test_groups_differ_by_at_most_one_layer(groups, more):
    layers = groups + more
    values = pattern_values("r", f"inverted_triangle:1-{groups}/{groups}", layers)
    sizes = [values.count(group) for group in range(1, groups + 1)]
    assert values == sorted(values)
    assert sum(sizes) == layers and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"uniform"}))
def test_one_group_or_one_layer_takes_the_high_bound(shape):
    assert pattern_values("r", f"{shape}:2-8", 1) == [8]
    assert pattern_values("r", f"{shape}:2-8/1", 3) == [8, 8, 8]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("pyramid:2-8", "num_experts: unknown pattern 'pyramid'; known: diamond, hourglass, "),
        ("triangel:2-8", "Did you mean 'triangle'?"),
        ("triangle", "num_experts='triangle' must be written triangle:LOW-HIGH"),
        ("triangle:8", "num_experts='triangle:8' must be written triangle:LOW-HIGH"),
        ("triangle:2-8/x", "num_experts='triangle:2-8/x' must be written triangle:LOW-HIGH"),
        ("triangle:2-8-9", "num_experts='triangle:2-8-9' must be written"),
        ("uniform:2-8", "num_experts='uniform:2-8' must be written uniform:N"),
        ("uniform:2.5", "num_experts='uniform:2.5' must be written uniform:N"),
        ("triangle:8-2", "num_experts='triangle:8-2': the low bound is above the high one"),
        ("triangle:2-8/0", "num_experts='triangle:2-8/0': the number of groups must be at least 1"),
    ],
)
def test_a_bad_pattern_is_named_with_what_is_allowed(pattern, said):
    with pytest.raises(ValueError) as caught:
        check_setting("num_experts", pattern, accept)
    assert said in str(caught.value)


def test_more_groups_than_layers():
    with pytest.raises(ValueError, match=r"num_experts='triangle:2-8/4' has 4 groups for 3 layers"):
        pattern_values("num_experts", "triangle:2-8/4", 3)


def test_every_leaf_is_checked_under_a_name_that_finds_it():
    def leaves(value: object) -> list[tuple[str, object]]:
        seen: list[tuple[str, object]] = []
        check_setting("r", value, lambda name, leaf: seen.append((name, leaf)))
        return seen

    assert leaves(8) == [("r", 8)]
    assert leaves([2, [4, 8]]) == [("r[0]", 2), ("r[1]", [4, 8])]
    assert leaves({"q_proj": 2, ".*": 4}) == [("r['q_proj']", 2), ("r['.*']", 4)]
    assert [leaf for _, leaf in leaves("triangle:2-8/4")] == [2, 8]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "r=[] is empty"),
        ({}, "r={} is an empty regex map"),
        ({"q_proj": 2, "(": 4}, "r: '(' is not a regex"),
    ],
)
def test_forms_that_can_never_work(value, said):
    with pytest.raises(ValueError) as caught:
        check_setting("r", value, accept)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "model.layers.0.not_q_proj", False),
        ("q_proj", "model.q_proj.inner", False),
        ("[qv]_proj", "model.layers.0.v_proj", True),
        ("q_proj|v_proj", "model.layers.0.v_proj", True),
        ("q_proj|v_proj", "model.q_proj.inner", False),
        (r"layers\.1\..*", "model.layers.1.mlp.up_proj", True),
        (r"layers\.1\..*", "model.layers.11.mlp.up_proj", False),
        (".*", "anything.at.all", True),
    ],
)
def test_a_regex_matches_a_whole_name_or_its_end_after_a_dot(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_the_first_matching_regex_counts():
    value = {"q_proj": 1, r"layers\.0\..*": 2, ".*": 3}
    names = ["layers.0.q_proj", "layers.0.k_proj", "layers.1.k_proj"]
    assert [resolve_setting("r", value, name, None, 0) for name in names] == [1, 2, 3]


def test_values_by_layer():
    assert resolve_setting("r", 8, "head", None, 3) == 8
    assert resolve_setting("r", [2, 4, 6], "layers.1.x", 1, 3) == 4
    assert resolve_setting("r", [[2, 2], [4, 8], 6], "layers.1.x", 1, 3) == [4, 8]
    assert resolve_setting("r", "triangle:2-6", "layers.1.x", 1, 3) == 4


@pytest.mark.parametrize(
    ("value", "layer", "said"),
    [
        ([2, 4], 0, "r lists 2 values, but the model has 3 layers"),
        ([2, 4, 6], None, "the site 'blocks.a' is in no numbered layer"),
        ("uniform:4", None, "r='uniform:4' goes by layer, but the site 'blocks.a' is in no"),
        ({"q_proj": 4, "v_proj": 2}, 0, "r has no entry for the site 'blocks.a'; its regexes are "
         "'q_proj', 'v_proj'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model(value, layer, said):
    with pytest.raises(ValueError) as caught:
        resolve_setting("r", value, "blocks.a", layer, 3)
    assert said in str(caught.value)
