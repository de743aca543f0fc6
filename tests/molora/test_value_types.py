"""Values of settings, against what the constructors' annotations say."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from molora.composition import COMPOSERS
from molora.experts import EXPERTS
from molora.gates import GATES
from molora.losses import LOSSES
from molora.registry import options_of
from molora.routers import ROUTERS
from molora.value_types import wanted_type

OPTIONS = [
    pytest.param(option.annotation, id=f"{registry.kind} {name}: {option.name}")
    for registry in (ROUTERS, GATES, EXPERTS, LOSSES, COMPOSERS)
    for name in registry.names()
    for option in options_of(registry.get(name)).values()
    # Only `molora.compose` takes these, and reads them itself.
    if option.name not in ("gates", "centroids", "descriptions")
]


@pytest.mark.parametrize(
    ("annotation", "values"),
    [
        (float, [0, -2, 0.5]),
        (int, [0, -2]),
        (bool, [True, False]),
        (str, ["", "1"]),
        (float | None, [None, 1.5]),
        (Sequence[float], [[], [1, 0.5], (1,)]),
        (Sequence[str] | None, [None, ["a"]]),
        (dict, [None, 1, "unknown annotations are left to their reader"]),
        ("float", [None]),
    ],
    ids=str,
)
def test_what_the_annotation_says_is_taken(annotation: Any, values: list):
    assert [wanted_type(value, annotation) for value in values] == [None] * len(values)


@pytest.mark.parametrize(
    ("annotation", "values", "wanted"),
    [
        (float, [math.nan, math.inf, True, None, "1", [1.0]], "a finite number"),
        (int, [2.0, True, None, "1"], "a whole number"),
        (bool, [0, 1, None, "false"], "True or False"),
        (str, [0, None, ["a"]], "a string"),
        (int | None, [0.5, "", False], "a whole number or None"),
        (Sequence[float], [1.0, "1", [True], [math.nan], {1: 2}], "a list of finite numbers"),
        (Sequence[str] | None, ["abc", [1]], "a list of strings or None"),
    ],
    ids=str,
)
def test_anything_else_is_told_what_was_wanted(annotation: Any, values: list, wanted: str):
    assert [wanted_type(value, annotation) for value in values] == [wanted] * len(values)


@pytest.mark.parametrize("annotation", OPTIONS)
def test_no_option_has_an_annotation_that_is_left_to_its_reader(annotation: Any):
    assert wanted_type(object(), annotation) is not None
