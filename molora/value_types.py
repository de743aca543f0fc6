"""The types that settings have, as a constructor's annotations name them."""

import math
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, TypeGuard, get_args, get_origin


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, and no bool."""
    return isinstance(value, int) and type(value) is not bool


# annotation -> whether a value is of that type, how one is called, and how several are
KNOWN: dict[Any, tuple[Callable[[object], bool], str, str]] = {
    float: (is_number, "a finite number", "finite numbers"),
    int: (is_whole, "a whole number", "whole numbers"),
    bool: (lambda value: isinstance(value, bool), "True or False", "bools"),
    str: (lambda value: isinstance(value, str), "a string", "strings"),
    NoneType: (lambda value: value is None, "None", "None"),
}


def wanted_type(value: object, annotation: Any) -> str | None:
    """What the value should have been, in words; None if it is that.

    Args:
        value: anything, such as JSON holds.
        annotation: one of `KNOWN`, a `Sequence` of one, or a union of those. What is annotated
            otherwise is its reader's to check.
    """
    wanted = []
    for one in get_args(annotation) if isinstance(annotation, UnionType) else (annotation,):
        several = get_origin(one) is Sequence
        kind = KNOWN.get(get_args(one)[0] if several else one)
        if kind is None:
            return None
        is_kind, singular, plural = kind
        if is_kind(value) and not several:
            return None
        if several and isinstance(value, list | tuple) and all(map(is_kind, value)):
            return None
        wanted.append(f"a list of {plural}" if several else singular)
    return " or ".join(wanted)
