"""Runs a plan on operands of any leading shape; the maths is in the module of the path."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from molora_kernels import dense, grouped
from molora_kernels.plan import Plan


def without_autocast(tensor: Tensor) -> Any:
    """A context in which torch's operations keep the dtypes they are given."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def buffer_for_u(x: Tensor, A: Tensor, plan: Plan) -> Tensor:
    """(T, at least as many columns as A has rows) in the compute dtype, to be filled by forward."""
    tokens = x.numel() // x.shape[-1]
    return x.new_empty(tokens, plan.columns_of_u(A), dtype=plan.compute_dtype)


def forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float | Tensor,
    out: Tensor | None,
    plan: Plan,
    u: Tensor | None,
    in_place: bool,
) -> Tensor:
    """Y (..., d_out); fills ``u`` where it is given."""
    with without_autocast(x):
        factors = (A.to(plan.product_dtype), B.to(plan.product_dtype))
        if u is not None and plan.path != "sorted":
            u = u[:, : A.shape[0]]
        result_dtype = x.dtype if out is None else out.dtype
        rest: tuple[Any, ...] = (scale, rows_of(out), plan.layout, result_dtype, in_place)
        rows, gate_rows = x.reshape(-1, x.shape[-1]), rows_of(gate)
        if plan.path == "decode":
            from molora_kernels import triton_decode

            assert gate_rows is not None
            y = triton_decode.forward(rows, *factors, gate_rows, plan.active, *rest)
        elif plan.path == "sorted":
            from molora_kernels import triton_sorted

            assert gate_rows is not None
            rest = (plan.active, *rest, u, plan.precision)
            y = triton_sorted.forward(rows, *factors, gate_rows, *rest)
        elif plan.path == "triton":
            from molora_kernels import triton_launch

            rest = (*rest, u, plan.precision)
            y = triton_launch.forward(rows, *factors, gate_rows, *rest)
        elif plan.path == "grouped":
            assert gate_rows is not None
            y = grouped.forward(rows, *factors, gate_rows, *rest)
        else:
            y = dense.forward(rows, *factors, gate_rows, *(*rest, u, plan.emulated))
    return y.view(*x.shape[:-1], B.shape[0])


def backward(
    dy: Tensor,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    u: Tensor | None,
    scale: float | Tensor,
    plan: Plan,
    needs: dense.Needs,
    x_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dA, dB, dgate) in the shapes and dtypes of what they are gradients of.

    x may be None where :func:`reads_x` says so, u where ``needs.saved_u`` does.
    """
    with without_autocast(dy):
        rows, gate_rows = dy.reshape(-1, dy.shape[-1]), rows_of(gate)
        factors = (A.to(plan.product_dtype), B.to(plan.product_dtype))
        if u is not None and plan.path != "sorted":
            u = u[:, : A.shape[0]]
        rest: tuple[Any, ...] = (scale, plan.layout, needs, x_dtype)
        if plan.path == "triton":
            from molora_kernels import triton_launch

            rest = (u, *rest, plan.precision)
            grads = triton_launch.backward(rows, rows_of(x), *factors, gate_rows, *rest)
        elif plan.path == "sorted":
            from molora_kernels import triton_sorted

            assert gate_rows is not None
            rest = (plan.active, u, *rest, plan.precision)
            grads = triton_sorted.backward(rows, rows_of(x), *factors, gate_rows, *rest)
        elif plan.path == "grouped":
            assert gate_rows is not None
            grads = grouped.backward(rows, rows_of(x), *factors, gate_rows, *rest)
        else:
            grads = dense.backward(
                rows, rows_of(x), *factors, gate_rows, *(u, *rest, plan.emulated)
            )
        dx, dA, dB, dgate = grads
        if dgate is not None and gate_rows is not None and plan.active:
            dgate.masked_fill_(gate_rows == 0, 0.0)
    return (
        None if dx is None else dx.view(*dy.shape[:-1], A.shape[1]),
        None if dA is None else dA.to(A.dtype),
        # DDP's buckets hold gradients in the layout of their parameters
        None if dB is None else dB.to(B.dtype).contiguous(),
        None if dgate is None or gate is None else dgate.view(gate.shape),
    )


def reads_x(plan: Plan, needs: dense.Needs) -> bool:
    """Whether backward reads x."""
    return needs.A or (plan.path == "grouped" and needs.saved_u)


def rows_of(tensor: Tensor | None) -> Tensor | None:
    """(..., n) as (T, n)."""
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])
