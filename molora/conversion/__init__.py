"""Checkpoints of other libraries as MoLoRA adapters."""

from .convert import FORMATS, Conversion, convert, plan_conversion

__all__ = ["FORMATS", "Conversion", "convert", "plan_conversion"]
