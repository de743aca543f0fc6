"""The public operator: checks, dtype rules, autograd. The maths is in the module that runs it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora_kernels import compiled, few_tokens, run
from molora_kernels.dense import Needs
from molora_kernels.layout import check_operands, resolve_layout, spread_gate
from molora_kernels.plan import Plan, make_plan

DEFAULTS = (None, "ieee", "auto", "auto")  # of tied, precision, dispatch, backend
TORCH_PATHS = ("dense", "grouped")  # the kernels keep U for the backward in no pass in place


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
    overwrite: bool = False,
) -> Tensor:
    """Add the routed low-rank update of all experts: ``out + scale * (gate . (x A^T)) B^T``.

    Args:
        x: (..., d_in), any floating dtype.
        A: (R, d_in), the experts' down factors stacked expert by expert.
        B: (d_out, R), their up factors, in A's dtype.
        gate: (..., E) weight of each routed expert, or (..., R - always_on) weight of each routed
            rank column; broadcasts to x's leading dimensions, or has x's T rows. None: all on.
        scale: a float, or (R,) one factor per rank column. No gradient flows to it.
        out: (..., d_out), the base layer's result. None: the update alone.
        ranks: ranks of the routed experts in column order. Default: an equal split.
        tied: "A": A holds one expert's rows, B is (d_out, E r + always_on); "B": the mirror image.
        always_on: number of trailing columns that no gate multiplies.
        active: K, the most experts that one token chose: a gate entry of exactly zero means one not
            chosen, and gets no gradient. None: every entry gets its own.
        precision: how Triton multiplies fp32 ("ieee", "tf32", "tf32x3"); torch has its own setting.
        dispatch: "dense" forms all columns for all tokens, "grouped" gathers each expert's tokens
            (needs ``active``); "auto" takes the faster one (:mod:`molora_kernels.rule`).
        backend: "torch" (its GEMMs), "triton" (this package's kernels), or "auto": Triton
            on a GPU that has it and operands whose rows are aligned, else torch.
        overwrite: no graph keeps ``out``: it may be overwritten and returned with gradients too.

    Returns:
        (..., d_out) in out's dtype, or in x's without out; without gradients maybe ``out`` itself.

    Products are formed in the autocast dtype under autocast, else in A's; the gate is multiplied
    in fp32 (fp64 for fp64). What doesn't fit is a ValueError, for dtypes a TypeError.
    """
    if not torch.is_grad_enabled() and (tied, precision, dispatch, backend) == DEFAULTS:
        quick = few_tokens.forward(x, A, B, gate, scale, out, ranks, always_on)
        if quick is not None:
            return quick
    layout = resolve_layout(A, B, gate, ranks, always_on, tied)
    check_operands(x, A, B, gate, scale, out, layout)
    gate = spread_gate(gate, x, layout)
    learns = _wants_gradients(x, A, B, gate, out)
    plan = make_plan(x, A, B, layout, active, precision, dispatch, backend, learns)
    if torch.compiler.is_compiling():
        return compiled.routed_lora(x, A, B, gate, scale, out, plan)
    if learns:
        return _RoutedLora.apply(x, A, B, gate, scale, out, plan, overwrite)
    return _without_gradients(x, A, B, gate, scale, out, plan)


def _without_gradients(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float | Tensor,
    out: Tensor | None,
    plan: Plan,
) -> Tensor:
    in_place = not torch.is_grad_enabled() and _may_overwrite(out, x)
    y = run.forward(x, A, B, gate, scale, out, plan, None, in_place)
    return out if in_place and out is not None else y


def _wants_gradients(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)


def _may_overwrite(out: Tensor | None, x: Tensor) -> bool:
    """Whether the update may be accumulated into ``out`` itself.

    Not with gradients on (a graph may hold the tensor) unless the caller says so, not into a view,
    an expanded tensor, a leaf that wants gradients or x's own memory (an identity base layer
    returns x).
    """
    return (
        out is not None
        and not out._is_view()
        and not (out.requires_grad and out.is_leaf)
        and out.is_contiguous()
        and out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    )


class _RoutedLora(torch.autograd.Function):
    """The eager form. Keeps U and the gate besides the operands."""

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
        overwrite: bool,
    ) -> Tensor:
        needs = Needs(*ctx.needs_input_grad[:4])
        u = run.buffer_for_u(x, A, plan) if needs.saved_u and plan.path != "grouped" else None
        in_place = overwrite and plan.path in TORCH_PATHS and _may_overwrite(out, x)
        y = run.forward(x, A, B, gate, scale, out, plan, u, in_place)
        if in_place and out is not None:
            ctx.mark_dirty(out)
            y = out
        kept_x = x if run.reads_x(plan, needs) else None
        per_column = scale if isinstance(scale, Tensor) else None
        ctx.save_for_backward(kept_x, A, B, gate, u, per_column)
        ctx.plan, ctx.needs, ctx.x_dtype = plan, needs, x.dtype
        ctx.scale = None if isinstance(scale, Tensor) else scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, gate, u, scale = ctx.saved_tensors
        grads: tuple[Tensor | None, ...] = (None,) * 4
        if any(ctx.needs_input_grad[:4]):
            scale = ctx.scale if scale is None else scale
            grads = run.backward(dy, x, A, B, gate, u, scale, ctx.plan, ctx.needs, ctx.x_dtype)
        return *grads, None, dy if ctx.needs_input_grad[5] else None, None, None
