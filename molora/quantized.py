"""What quantised base modules need beside PEFT's backends."""

from typing import Any

from torch import nn


def keep_4bit_layout(model: nn.Module) -> None:
    """Stop bitsandbytes (0.50) from repacking weights for a CPU with AVX512-BF16.

    It does so in the first pass in eval mode, and afterwards they pass no gradient on in training
    and are dequantised to something else when they are merged.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            state: Any = getattr(module.weight, "quant_state", None)
            packed = getattr(state, "packing_format_for_cpu", False)
            module.state_dict()  # undoes it where it has happened
            if packed and not state.nested:
                # but leaves the scales of single quantisation transposed
                state.absmax = state.absmax.T.reshape(-1).float()
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
