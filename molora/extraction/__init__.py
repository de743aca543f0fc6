"""LoRA adapters from full fine-tunes."""

from .extract import extract_lora, plan_extraction
from .report import Extraction

__all__ = ["Extraction", "extract_lora", "plan_extraction"]
