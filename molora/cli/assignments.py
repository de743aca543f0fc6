"""`NAME=VALUE` on the command line."""

import json
from collections.abc import Iterable
from typing import Any

from ..registry import unknown_name_message

# As Python prints them, which JSON doesn't know.
CONSTANTS = {"True": True, "False": False, "None": None}


def read_assignment(text: str, kind: str, known: Iterable[str]) -> tuple[str, Any]:
    """The name, and the value as JSON or one of Python's constants, or else as it stands.

    Args:
        text: of an option `--set`.
        kind: what the name is of, such as "field", for the error.
        known: the names that there are.

    Raises:
        ValueError: it has another form, or an unknown name.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r} is not of the form {kind.upper()}=VALUE.")
    if name not in known:
        raise ValueError(unknown_name_message(kind, name, known))
    if value in CONSTANTS:
        return name, CONSTANTS[value]
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
