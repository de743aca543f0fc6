"""The products of a routed site. This is the only module that imports `molora_kernels`."""

from molora_kernels import add_blocks, routed_lora, router_logits, widened

__all__ = ["add_blocks", "routed_lora", "router_logits", "widened"]
