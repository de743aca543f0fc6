"""Published methods, one per file: what each sets, and how it differs from its paper."""

from . import lora, loramoe, mola
from .base import METHODS, Method, available_methods, register_method

__all__ = [
    "METHODS",
    "Method",
    "available_methods",
    "lora",
    "loramoe",
    "mola",
    "register_method",
]
