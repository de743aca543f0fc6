"""Published methods, one per file: what each sets, and how it differs from its paper."""

from . import hydralora, lora, loramoe, mola, mosld
from .base import METHODS, Method, available_methods, register_method

__all__ = [
    "METHODS",
    "Method",
    "available_methods",
    "hydralora",
    "lora",
    "loramoe",
    "mola",
    "mosld",
    "register_method",
]
