"""The operator as a ``torch.library`` custom op: one opaque node for torch.compile and export.

Eager calls don't come through here: an autograd function costs less per call, keeps only what the
wanted gradients need and may accumulate in place. Both run :mod:`molora_kernels.run`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from molora_kernels import run
from molora_kernels.dense import Needs
from molora_kernels.layout import RankLayout
from molora_kernels.plan import Plan


def routed_lora(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float | Tensor,
    out: Tensor | None,
    plan: Plan,
) -> Tensor:
    """The traceable form of a call whose operands were checked."""
    y, _ = routed_lora_op(x, A, B, gate, *_split(scale), out, *_flat(plan))
    return y


@custom_op("molora_kernels::routed_lora", mutates_args=())
def routed_lora_op(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float,
    scales: Tensor | None,
    out: Tensor | None,
    ranks: list[int],
    always_on: int,
    tied: str,
    compute_dtype: torch.dtype,
    product_dtype: torch.dtype,
    path: str,
    active: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(Y, U). ``scales`` takes the place of ``scale`` where it is given; tied is "" for neither."""
    plan = _plan(ranks, always_on, tied, compute_dtype, product_dtype, path, active, precision)
    u = run.buffer_for_u(x, A, plan)
    u[:, A.shape[0] :] = 0  # an op's results must not depend on what its memory held
    kept = u if u.shape[1] else None
    either = scale if scales is None else scales
    return run.forward(x, A, B, gate, either, out, plan, kept, in_place=False), u


@routed_lora_op.register_fake
def _(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float,
    scales: Tensor | None,
    out: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], B.shape[0], dtype=x.dtype if out is None else out.dtype)
    return y, run.buffer_for_u(x, A, _plan(*options))


@custom_op("molora_kernels::routed_lora_backward", mutates_args=())
def routed_lora_backward_op(
    dy: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    u: Tensor,
    scale: float,
    scales: Tensor | None,
    ranks: list[int],
    always_on: int,
    tied: str,
    compute_dtype: torch.dtype,
    product_dtype: torch.dtype,
    path: str,
    active: int,
    precision: str,
    needs: list[bool],
) -> list[Tensor]:
    """Those of (dX, dA, dB, dgate) that ``needs`` asks for."""
    plan = _plan(ranks, always_on, tied, compute_dtype, product_dtype, path, active, precision)
    either = scale if scales is None else scales
    kept = None if path == "grouped" else u
    grads = run.backward(dy, x, A, B, gate, kept, either, plan, Needs(*needs), x.dtype)
    return [grad for grad in grads if grad is not None]


@routed_lora_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, u: Tensor, *options: Any
) -> list[Tensor]:
    wanted = zip((x, A, B, gate), options[-1], strict=True)
    return [t.new_empty(t.shape) for t, needed in wanted if needed and t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, gate, scale, scales, _, *plan = inputs
    ctx.save_for_backward(x, A, B, gate, output[1], scales)
    ctx.scale, ctx.plan = scale, plan
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, A, B, gate, u, scales = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads = iter(
        routed_lora_backward_op(dy, x, A, B, gate, u, ctx.scale, scales, *ctx.plan, needs)
        if any(needs)
        else []
    )
    four = [next(grads) if needed else None for needed in needs]
    dout = dy if ctx.needs_input_grad[6] else None
    return *four, None, None, dout, *[None] * len(ctx.plan)


routed_lora_op.register_autograd(_backward, setup_context=_setup_context)


def _split(scale: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, scale) if isinstance(scale, Tensor) else (scale, None)


def _flat(plan: Plan) -> tuple[Any, ...]:
    layout = plan.layout
    return (
        list(layout.ranks),
        layout.always_on,
        layout.tied or "",
        plan.compute_dtype,
        plan.product_dtype,
        plan.path,
        plan.active,
        plan.precision,
    )


def _plan(ranks: list[int], always_on: int, tied: str, *rest: Any) -> Plan:
    return Plan(RankLayout(tuple(ranks), always_on, tied or None), *rest)
