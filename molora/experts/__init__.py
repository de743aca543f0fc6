"""Expert parametrisations: what an expert's parameters are and how they act."""

from .base import EXPERTS, Experts, register_experts
from .lora import LoraExperts

__all__ = ["EXPERTS", "Experts", "LoraExperts", "register_experts"]
