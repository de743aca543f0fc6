"""Adapters for stacks that don't know this library."""

from .lora import export_experts, export_lora

__all__ = ["export_experts", "export_lora"]
