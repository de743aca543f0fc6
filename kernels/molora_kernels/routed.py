"""The public operator: checks, dtype rules, autograd. The maths is in the module that runs it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora_kernels import dense, grouped, rule
from molora_kernels.layout import RankLayout, check_operands, resolve_layout, spread_gate

PRECISIONS = ("ieee", "tf32", "tf32x3")
DISPATCHES = ("auto", "dense", "grouped")
BACKENDS = ("auto", "torch")


@dataclass(frozen=True)
class Plan:
    """What is decided before any arithmetic."""

    layout: RankLayout
    compute_dtype: torch.dtype  # of the factors and of U, as autocast or the factors set it
    product_dtype: torch.dtype  # of the GEMMs
    grouped: bool
    zero_is_unchosen: bool  # gate entries that are zero get no gradient


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
    active: int | None = None,
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
        active: K, the largest number of experts that one token chose. It says that a gate entry
            which is exactly zero means an expert that was not chosen: its gradient is zero then.
            None: every gate entry gets its gradient, and tokens are never grouped by expert.
        precision: how a GPU multiplies fp32: "ieee", "tf32" or "tf32x3".
        dispatch: "dense" forms all columns for all tokens, "grouped" gathers the tokens of each
            expert (needs ``active``); "auto" takes the faster one (:mod:`molora_kernels.rule`).
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
    plan = _plan(A, layout, active, dispatch)
    operands = (x, A, B, gate, out)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        return _RoutedLora.apply(x, A, B, gate, scale, out, plan)
    in_place = _may_overwrite(out, x)
    y = _forward(x, A, B, gate, scale, out, plan, None, in_place)
    return out if in_place and out is not None else y


def _plan(A: Tensor, layout: RankLayout, active: int | None, dispatch: str) -> Plan:
    compute = _compute_dtype(A)
    product = dense.product_dtype(compute, A.device)
    obstacle = rule.can_group(layout, active)
    if dispatch == "grouped" and obstacle is not None:
        raise ValueError(f"dispatch='grouped' can't be used: {obstacle}")
    group = obstacle is None and dispatch != "dense"
    if dispatch == "auto" and group and active is not None:
        group = rule.pays(layout, active, A.device, product)
    return Plan(layout, compute, product, group, active is not None)


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
        rows = x.reshape(-1, x.shape[-1])
        factors = (A.to(plan.product_dtype), B.to(plan.product_dtype))
        result_dtype = x.dtype if out is None else out.dtype
        rest: tuple[Any, ...] = (scale, _rows(out), plan.layout, result_dtype, in_place)
        if plan.grouped:
            assert gate is not None
            y = grouped.forward(rows, *factors, gate.reshape(-1, gate.shape[-1]), *rest)
        else:
            y = dense.forward(rows, *factors, _rows(gate), *(*rest, u))
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
        if needs.saved_u and not plan.grouped:
            tokens = x.numel() // x.shape[-1]
            u = A.new_empty(tokens, A.shape[0], dtype=plan.compute_dtype)
        y = _forward(x, A, B, gate, scale, out, plan, u, in_place=False)
        per_column = isinstance(scale, Tensor)
        ctx.save_for_backward(
            x if needs.A or (plan.grouped and needs.saved_u) else None,
            A,
            B,
            gate,
            u,
            scale if per_column else None,
        )
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
            plan = ctx.plan
            dy_rows, x_rows, gate_rows = dy.reshape(-1, dy.shape[-1]), _rows(x), _rows(gate)
            factors = (A.to(plan.product_dtype), B.to(plan.product_dtype))
            rest: tuple[Any, ...] = (
                ctx.scale if scale is None else scale,
                plan.layout,
                ctx.needs,
                ctx.x_dtype,
            )
            if plan.grouped:
                assert gate_rows is not None
                grads = grouped.backward(dy_rows, x_rows, *factors, gate_rows, *rest)
            else:
                grads = dense.backward(dy_rows, x_rows, *factors, gate_rows, u, *rest)
            dx, dA, dB, dgate = grads
            if dgate is not None and plan.zero_is_unchosen and not plan.grouped:
                dgate.mul_(gate_rows != 0)
        return (
            None if dx is None else dx.view(ctx.x_shape),
            None if dA is None else dA.to(A.dtype),
            None if dB is None else dB.to(B.dtype, memory_format=torch.contiguous_format),
            None if dgate is None else dgate.view(gate.shape),
            None,
            dout,
            None,
        )
