"""The public operator: checks, dtype rules, autograd. The maths is in the module that runs it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora_kernels import dense
from molora_kernels.layout import RankLayout, check_operands, resolve_layout, spread_gate

PRECISIONS = ("ieee", "tf32", "tf32x3")
DISPATCHES = ("auto", "dense")
BACKENDS = ("auto", "torch")


@dataclass(frozen=True)
class Plan:
    """What is decided before any arithmetic."""

    layout: RankLayout
    compute_dtype: torch.dtype  # of the factors and of U, as autocast or the factors set it
    product_dtype: torch.dtype  # of the GEMMs


def routed_lora(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float | Tensor = 1.0,
    out: Tensor | None = None,
    *,
    ranks: Sequence[int] | None = None,
    tied: str | None = None,
    always_on: int = 0,
    precision: str = "ieee",
    dispatch: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Add the routed low-rank update of all experts: ``out + scale * (gate . (x A^T)) B^T``.

    Args:
        x: (..., d_in), any floating dtype.
        A: (R, d_in), the experts' down factors stacked expert by expert.
        B: (d_out, R), their up factors, in A's dtype.
        gate: (..., E) weight of each routed expert, or (..., R - always_on) weight of each routed
            rank column; must broadcast to x's leading dimensions. None: every column is on.
        scale: a float, or (R,) one factor per rank column. No gradient flows to it.
        out: (..., d_out), the base layer's result. None: only the update is returned.
        ranks: ranks of the routed experts in column order. Default: an equal split.
        tied: None; "A": A holds one expert's rows, shared by all, and B is
            (d_out, E r + always_on); "B": the mirror image.
        always_on: number of trailing rank columns that no gate multiplies.
        precision: how a GPU multiplies fp32: "ieee", "tf32" or "tf32x3".
        dispatch: "dense" forms all columns; "auto" chooses.
        backend: "torch", or "auto" to choose.

    Returns:
        (..., d_out) in out's dtype, or in x's where out is None. ``out`` itself is overwritten
        when gradients are off and that is safe: use the returned tensor.

    Products are formed in the autocast dtype where autocast is on, else in A's dtype; the gate is
    multiplied in fp32 (fp64 for fp64). Gradients come in each operand's own dtype.

    Raises:
        ValueError: shapes, devices or option values that don't fit.
        TypeError: dtypes that don't fit.
    """
    for name, value, known in (
        ("precision", precision, PRECISIONS),
        ("dispatch", dispatch, DISPATCHES),
        ("backend", backend, BACKENDS),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known values: {', '.join(known)}")
    layout = resolve_layout(A, B, gate, ranks, always_on, tied)
    check_operands(x, A, B, gate, scale, out, layout)
    gate = spread_gate(gate, x, layout)
    compute_dtype = _compute_dtype(A)
    plan = Plan(layout, compute_dtype, dense.product_dtype(compute_dtype, A.device))
    operands = (x, A, B, gate, out)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        return _RoutedLora.apply(x, A, B, gate, scale, out, plan)
    in_place = _may_overwrite(out, x)
    y = _forward(x, A, B, gate, scale, out, plan, None, in_place)
    return out if in_place and out is not None else y


def _compute_dtype(A: Tensor) -> torch.dtype:
    device = A.device.type
    # like torch's own linear, autocast leaves double precision alone
    if A.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return A.dtype


def without_autocast(tensor: Tensor) -> Any:
    """A context in which torch's operations keep the dtypes they are given."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _may_overwrite(out: Tensor | None, x: Tensor) -> bool:
    """Whether the update may be accumulated into ``out`` itself.

    Not with gradients on (a graph may hold the tensor), not into a view, an expanded tensor, a leaf
    that wants gradients or x's own memory (an identity base layer returns x).
    """
    return (
        out is not None
        and not torch.is_grad_enabled()
        and not out._is_view()
        and not out.requires_grad
        and out.is_contiguous()
        and out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    )


def _forward(
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
    with without_autocast(x):
        y = dense.forward(
            x.reshape(-1, x.shape[-1]),
            A.to(plan.product_dtype),
            B.to(plan.product_dtype),
            _rows(gate),
            scale,
            _rows(out),
            plan.layout,
            x.dtype if out is None else out.dtype,
            in_place,
            u,
        )
    return y.view(*x.shape[:-1], B.shape[0])


def _rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


class _RoutedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        gate: Tensor | None,
        scale: float | Tensor,
        out: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        needs = dense.Needs(*ctx.needs_input_grad[:4])
        u = None
        if needs.saved_u:
            tokens = x.numel() // x.shape[-1]
            u = A.new_empty(tokens, A.shape[0], dtype=plan.compute_dtype)
        y = _forward(x, A, B, gate, scale, out, plan, u, in_place=False)
        per_column = isinstance(scale, Tensor)
        ctx.save_for_backward(x if needs.A else None, A, B, gate, u, scale if per_column else None)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.plan, ctx.needs, ctx.scale = plan, needs, None if per_column else scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, gate, u, scale = ctx.saved_tensors
        dout = dy if ctx.needs_input_grad[5] else None
        if not any(ctx.needs_input_grad[:4]):
            return None, None, None, None, None, dout, None
        with without_autocast(dy):
            dx, dA, dB, dgate = dense.backward(
                dy.reshape(-1, dy.shape[-1]),
                _rows(x),
                A.to(ctx.plan.product_dtype),
                B.to(ctx.plan.product_dtype),
                _rows(gate),
                u,
                ctx.scale if scale is None else scale,
                ctx.plan.layout,
                ctx.needs,
                ctx.x_dtype,
            )
        return (
            None if dx is None else dx.view(ctx.x_shape),
            None if dA is None else dA.to(A.dtype),
            None if dB is None else dB.to(B.dtype, memory_format=torch.contiguous_format),
            None if dgate is None else dgate.view(gate.shape),
            None,
            dout,
            None,
        )
