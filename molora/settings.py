"""Settings that may differ between layers: a number, a list, a named pattern or a regex map.

| form | example | meaning |
|---|---|---|
| number | `8` | the same at every site |
| list | `[2, 4, 6, 8]` | one value per layer of the model |
| pattern | `"inverted_triangle:2-8/4"` | from 2 to 8 along the depth, in 4 groups of layers |
| regex map | `{"q_proj": 8, ".*": 4}` | the first regex that matches the end of the site's name |

Patterns are the shapes that MoLA (arXiv 2402.08562) compares, with any bounds: `uniform:N`,
`triangle:LOW-HIGH` (most at the bottom), `inverted_triangle:LOW-HIGH` (most at the top),
`hourglass:LOW-HIGH` (most at both ends) and `diamond:LOW-HIGH` (most in the middle). `/GROUPS` cuts
the depth in that many equal groups; without it every layer has a value of its own, rounded.
"""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from .registry import unknown_name_message

PATTERN = re.compile(r"[a-z_]+:(?P<low>\d+)(?:-(?P<high>\d+))?(?:/(?P<groups>\d+))?")

Leaf = Any
LeafCheck = Callable[[str, Leaf], None]


def _fold(depth: Fraction) -> Fraction:
    return abs(2 * depth - 1)


# Each shape maps the depth in [0, 1] to a height that is then stretched over [low, high]. Exact
# fractions: with floats a hourglass over 13 layers was not symmetric, because of halves to round.
SHAPES: dict[str, Callable[[Fraction], Fraction]] = {
    "uniform": lambda depth: Fraction(1),
    "triangle": lambda depth: 1 - depth,
    "inverted_triangle": lambda depth: depth,
    "hourglass": _fold,
    "diamond": lambda depth: -_fold(depth),
}


def check_setting(field: str, value: Any, check_leaf: LeafCheck) -> None:
    """Raise `ValueError` unless `value` is one of the four forms with valid leaves."""
    for name, leaf in _leaves(field, value):
        check_leaf(name, leaf)


def is_zero(field: str, value: Any) -> bool:
    """Whether a setting, already checked, is 0 wherever it applies."""
    return all(leaf == 0 for _, leaf in _leaves(field, value))


def _leaves(field: str, value: Any) -> Iterator[tuple[str, Leaf]]:
    """The values, or the bounds, that a setting gives, each with a name for errors.

    Raises:
        ValueError: the setting is none of the four forms.
    """
    if isinstance(value, str):
        low, high, _ = _parse_pattern(field, value)[1:]
        yield from ((field, low), (field, high))
    elif isinstance(value, dict):
        if not value:
            raise ValueError(f"{field}={{}} is an empty regex map; give at least one entry.")
        for pattern, leaf in value.items():
            check_regex(field, pattern)
            yield f"{field}[{pattern!r}]", leaf
    elif isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{field}=[] is empty; give one value per layer.")
        for index, leaf in enumerate(value):
            yield f"{field}[{index}]", leaf
    else:
        yield field, value


def check_regex(field: str, pattern: Any) -> None:
    """Raise `ValueError` unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except (TypeError, re.error) as error:
        raise ValueError(f"{field}: {pattern!r} is not a regex: {error}.") from error


def resolve_setting(
    field: str, value: Any, site_name: str, layer: int | None, num_layers: int
) -> Leaf:
    """The value that applies at one site.

    Raises:
        ValueError: the list isn't as long as the model has layers, the site is in no layer although
            the setting goes by layer, or no regex matches the site's name.
    """
    if isinstance(value, dict):
        for pattern, leaf in value.items():
            if matches(pattern, site_name):
                return leaf
        raise ValueError(
            f"{field} has no entry for the site {site_name!r}; its regexes are "
            f"{', '.join(map(repr, value))}. End the map with '.*' to give all other sites a value."
        )
    if not isinstance(value, str | list | tuple):
        return value
    if layer is None:
        raise ValueError(
            f"{field}={value!r} goes by layer, but the site {site_name!r} is in no numbered layer. "
            f"Exclude it (exclude_modules) or give {field} as a number or a regex map."
        )
    if isinstance(value, str):
        return pattern_values(field, value, num_layers)[layer]
    if len(value) != num_layers:
        raise ValueError(
            f"{field} lists {len(value)} values, but the model has {num_layers} layers; "
            "a list gives one value for each layer."
        )
    return value[layer]


def matches(pattern: str, site_name: str) -> bool:
    """Whether the regex matches the whole name or its end after a dot, as PEFT's patterns do."""
    return re.fullmatch(rf"(.*\.)?({pattern})", site_name) is not None


def pattern_values(field: str, pattern: str, num_layers: int) -> list[int]:
    """The values of a named pattern, one per layer."""
    name, low, high, groups = _parse_pattern(field, pattern)
    steps = groups or num_layers
    if steps > num_layers:
        raise ValueError(
            f"{field}={pattern!r} has {steps} groups for {num_layers} layers; without the "
            f"/{steps} every layer has a value of its own."
        )
    heights = [SHAPES[name](Fraction(i, max(steps - 1, 1))) for i in range(steps)]
    lowest, highest = min(heights), max(heights)
    spread = highest - lowest
    values = [
        high if spread == 0 else low + round((height - lowest) / spread * (high - low))
        for height in heights
    ]
    return [values[layer * steps // num_layers] for layer in range(num_layers)]


def _parse_pattern(field: str, pattern: str) -> tuple[str, int, int, int | None]:
    name = pattern.partition(":")[0]
    if name not in SHAPES:
        raise ValueError(f"{field}: {unknown_name_message('pattern', name, SHAPES)}")
    found = PATTERN.fullmatch(pattern)
    if found is None or (found["high"] is None) != (name == "uniform"):
        form = "uniform:N" if name == "uniform" else f"{name}:LOW-HIGH, for example {name}:2-8"
        raise ValueError(f"{field}={pattern!r} must be written {form}; /GROUPS may follow.")
    low, high, groups = found["low"], found["high"], found["groups"]
    if high is not None and int(high) < int(low):
        raise ValueError(f"{field}={pattern!r}: the low bound is above the high one.")
    if groups is not None and int(groups) < 1:
        raise ValueError(f"{field}={pattern!r}: the number of groups must be at least 1.")
    return name, int(low), int(high or low), int(groups) if groups else None
