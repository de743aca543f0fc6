"""Router logits in full precision whatever the model's dtype."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora_kernels.run import without_autocast


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits ``x weight^T + bias`` in fp32, in fp64 when both x and weight are fp64.

    Args:
        x: (..., d_in), any floating dtype.
        weight: (E, d_in).
        bias: (E,) or None.

    Returns:
        (..., E) logits. Products are formed in fp32 also under autocast: rounding logits to bf16
        changes which experts are chosen. x is kept for the backward in its own dtype, so no fp32
        copy of it outlives the call.

    Raises:
        ValueError: shapes that don't fit.
    """
    check_router(x, weight, bias)
    if not torch.is_grad_enabled():
        return _logits(x, weight, bias)
    return _RouterLogits.apply(x, weight, bias)


def check_router(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise a ValueError that names the operand whose shape is off."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (..., d_in) and (E, d_in)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = _wide(x, weight)
    if x.dtype == weight.dtype == wide and not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias if bias is None or bias.dtype == wide else bias.to(wide))
    with without_autocast(x):
        return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def _wide(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == weight.dtype == torch.float64 else torch.float32


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.x_shape, ctx.dtypes = (
            x.shape,
            (x.dtype, weight.dtype, None if bias is None else bias.dtype),
        )
        ctx.wide = _wide(x, weight)
        return _logits(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = dweight = dbias = None
        with without_autocast(dlogits):
            rows = dlogits.reshape(-1, dlogits.shape[-1])
            if needs_x:
                dx = (rows @ weight.to(ctx.wide)).to(x_dtype).view(ctx.x_shape)
            if needs_weight:
                dweight = (rows.mT @ x.reshape(-1, x.shape[-1]).to(ctx.wide)).to(weight_dtype)
            if needs_bias:
                dbias = rows.sum(0).to(bias_dtype)
        return dx, dweight, dbias
