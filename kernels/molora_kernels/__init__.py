"""Routed batched LoRA: every expert's low-rank update of a linear layer in one operator.

    y = out + s * B (G(x) . (A x))

Works alone, with torch only or with torch and Triton; ``kernels/README.md`` holds the formulas.
"""

from molora_kernels.few_tokens import add_blocks, widened
from molora_kernels.fused import routed_lora_with_router
from molora_kernels.routed import routed_lora
from molora_kernels.router import router_logits

__all__ = ["add_blocks", "routed_lora", "routed_lora_with_router", "router_logits", "widened"]
