"""Whether Python may look at a tensor's numbers."""

import torch
from torch import Tensor


def in_plain_memory(x: Tensor) -> bool:
    """Whether Python may look at numbers made of x, in fp32 or fp64 on the CPU, and nothing has to
    be kept for a backward, a trace or a compiler."""
    if type(x) is not Tensor or not x.is_cpu or x.element_size() < 4 or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return not torch.is_autocast_enabled("cpu")
