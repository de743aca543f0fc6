"""Published methods, one per file: what each sets, and how it differs from its paper."""

from . import (
    flylora,
    goat,
    hydralora,
    lora,
    loramoe,
    mola,
    mor1e,
    mora,
    mosld,
    self_activated,
    smora,
    t_rex,
)
from .base import METHODS, Method, available_methods, register_method

__all__ = [
    "METHODS",
    "Method",
    "available_methods",
    "flylora",
    "goat",
    "hydralora",
    "lora",
    "loramoe",
    "mola",
    "mor1e",
    "mora",
    "mosld",
    "register_method",
    "self_activated",
    "smora",
    "t_rex",
]
