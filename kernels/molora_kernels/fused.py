"""The router's logits and the experts' columns from one read of x.

    U = X A^T,  logits = X W^T + b        then the caller's gate        Y = out + (s g U) B^T

Worth it where reading x is what costs, on a GPU: of the 3 T d elements that the forward moves and
the T d that a separate router reads, the latter is saved. Elsewhere one runs after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora_kernels.dense import Needs
from molora_kernels.layout import check_operands, resolve_layout, spread_gate
from molora_kernels.plan import Plan, compute_dtype, make_plan, prefers_triton
from molora_kernels.rankspace import gate_columns
from molora_kernels.routed import routed_lora
from molora_kernels.router import check_router, router_logits
from molora_kernels.run import rows_of, without_autocast

# The logits of all experts sit in registers beside a tile of U.
MOST_EXPERTS = 64


def routed_lora_with_router(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    make_gate: Callable[[Tensor], Tensor],
    scale: float | Tensor = 1.0,
    out: Tensor | None = None,
    *,
    ranks: Sequence[int] | None = None,
    tied: str | None = None,
    always_on: int = 0,
    active: int | None = None,
    precision: str = "ieee",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`routed_lora` whose gate is ``make_gate(logits)``, with the logits from the same pass.

    Args:
        router_weight: (E, d_in); router_bias: (E,) or None, as in :func:`router_logits`.
        make_gate: from logits (..., E) in fp32 to the gate; any differentiable torch code.

    Returns:
        The result (..., d_out) and the logits (..., E), both differentiable.

    Raises:
        ValueError, TypeError: as :func:`routed_lora` and :func:`router_logits`.
    """
    check_router(x, router_weight, router_bias)
    compute = compute_dtype(A)
    fits = tied is None and router_weight.shape[0] <= MOST_EXPERTS
    wants = backend == "triton" or (backend == "auto" and prefers_triton(x, B, compute))
    if not (fits and wants) or torch.compiler.is_compiling():
        logits = router_logits(x, router_weight, router_bias)
        y = routed_lora(
            x, A, B, make_gate(logits), scale, out, ranks=ranks, tied=tied, always_on=always_on,
            active=active, precision=precision, backend=backend,
        )  # fmt: skip
        return y, logits
    u, logits = _ShrinkRoute.apply(x, A, router_weight, router_bias, compute, precision)
    gate = make_gate(logits)
    layout = resolve_layout(A, B, gate, ranks, always_on, tied)
    check_operands(x, A, B, gate, scale, out, layout)
    plan = make_plan(x, A, B, layout, active, precision, "dense", "triton", True)
    result_dtype = x.dtype if out is None else out.dtype
    return _Expand.apply(u, B, spread_gate(gate, x, layout), scale, out, plan, result_dtype), logits


class _ShrinkRoute(torch.autograd.Function):
    """U (..., R) in the compute dtype and logits (..., E); keeps x, A and the router's weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compute: torch.dtype,
        precision: str,
    ) -> tuple[Tensor, Tensor]:
        from molora_kernels import triton_launch

        with without_autocast(x):
            rows = x.reshape(-1, x.shape[-1])
            u, logits = triton_launch.shrink_route(rows, A.to(compute), weight, bias, precision)
        ctx.save_for_backward(x, A, weight)
        ctx.compute, ctx.precision = compute, precision
        ctx.bias_dtype = None if bias is None else bias.dtype
        lead = x.shape[:-1]
        return u.unflatten(0, lead), logits.view(*lead, weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        from molora_kernels import triton_launch

        x, A, weight = ctx.saved_tensors
        needs_x, needs_A, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        dx = dA = dweight = dbias = None
        with without_autocast(du):
            rows = triton_launch.row_major(x.reshape(-1, x.shape[-1]))
            du_rows = triton_launch.row_major(du.reshape(-1, A.shape[0]))
            dlogits_rows = triton_launch.row_major(dlogits.reshape(-1, weight.shape[0]))
            exact = triton_launch.router_precision(rows, ctx.precision)
            if needs_x:
                dx = torch.empty_like(rows, memory_format=torch.contiguous_format)
                router = triton_launch.row_major(weight).to(dlogits.dtype)
                triton_launch.expand(
                    du_rows, triton_launch.row_major(A).to(ctx.compute).mT, None, dx, ctx.precision
                )
                triton_launch.expand(dlogits_rows, router.mT, dx, dx, exact)
                dx = dx.view(x.shape)
            if needs_A:
                dA = torch.empty_like(A, memory_format=torch.contiguous_format)
                triton_launch.outer(du_rows, rows, dA, ctx.precision)
            if needs_weight:
                dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
                triton_launch.outer(dlogits_rows, rows, dweight, exact)
            if needs_bias:
                dbias = dlogits_rows.sum(0).to(ctx.bias_dtype)
        return dx, dA, dweight, dbias, None, None


class _Expand(torch.autograd.Function):
    """Y (..., d_out) = out + (s g U) B^T; keeps U and the gate."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        B: Tensor,
        gate: Tensor | None,
        scale: float | Tensor,
        out: Tensor | None,
        plan: Plan,
        result_dtype: torch.dtype,
    ) -> Tensor:
        from molora_kernels import triton_launch

        with without_autocast(u):
            u_rows = u.reshape(-1, u.shape[-1])
            z = triton_launch.rank_buffer(u_rows, u.shape[-1], u.dtype)
            z.copy_(gate_columns(u_rows, rows_of(gate), scale, plan.layout))
            y = u.new_empty(u_rows.shape[0], B.shape[0], dtype=result_dtype)
            addend = None if out is None else triton_launch.row_major(out.reshape(y.shape))
            factor = triton_launch.row_major(B).to(u.dtype)
            triton_launch.expand(z, factor, addend, y, plan.precision)
        ctx.save_for_backward(u, B, gate, scale if isinstance(scale, Tensor) else None)
        ctx.plan, ctx.scale = plan, None if isinstance(scale, Tensor) else scale
        return y.view(*u.shape[:-1], B.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from molora_kernels import triton_launch

        u, B, gate, per_column = ctx.saved_tensors
        needs_u, needs_B, needs_gate = ctx.needs_input_grad[:3]
        scale = ctx.scale if per_column is None else per_column
        plan, needs = ctx.plan, Needs(needs_u, False, needs_B, needs_gate)
        dB = None
        with without_autocast(dy):
            rows = triton_launch.row_major(dy.reshape(-1, dy.shape[-1]))
            u_rows = triton_launch.rank_buffer(rows, u.shape[-1], u.dtype)
            u_rows.copy_(u.reshape(-1, u.shape[-1]))
            gate_rows = None
            if gate is not None:
                gate_rows = triton_launch.row_major(gate.reshape(-1, gate.shape[-1]))
            factor = triton_launch.row_major(B).to(u.dtype)
            du, z, dgate = triton_launch.rank_backward(
                rows, factor, u_rows, gate_rows, scale, plan.layout, needs, plan.precision
            )
            if z is not None:
                dB = torch.empty_like(B, memory_format=torch.contiguous_format)
                triton_launch.outer(z, rows, dB.mT, plan.precision)
            if dgate is not None and gate_rows is not None:
                if plan.active:
                    dgate.masked_fill_(gate_rows == 0.0, 0.0)
                dgate = dgate.view(gate.shape)
        du = None if du is None else du.unflatten(0, u.shape[:-1])
        return du, dB, dgate, None, dy if ctx.needs_input_grad[4] else None, None, None
