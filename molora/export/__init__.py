"""Adapters for stacks that don't know this library."""

from .bundle import export_bundle
from .lora import export_experts, export_lora
from .merged import save_merged
from .moe import export_moe

__all__ = ["export_bundle", "export_experts", "export_lora", "export_moe", "save_merged"]
