"""Which column of rank space belongs to which expert, and the checks of every operand's shape.

Rank space has R columns: first the routed experts' columns, expert by expert, then ``always_on``
columns that no gate touches. With a tied factor the shared side has the columns of one expert only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TIED = (None, "A", "B")


@dataclass(frozen=True)
class RankLayout:
    """The columns of rank space: ``ranks`` of the routed experts, then ``always_on`` columns."""

    ranks: tuple[int, ...]
    always_on: int = 0
    tied: str | None = None

    @property
    def experts(self) -> int:
        return len(self.ranks)

    @property
    def routed(self) -> int:
        """Columns that a gate multiplies, counted as if no factor were tied."""
        return sum(self.ranks)

    @property
    def columns(self) -> int:
        """R, counted as if no factor were tied."""
        return self.routed + self.always_on

    @property
    def rank(self) -> int | None:
        """The rank that all routed experts share, or None where they differ."""
        return self.ranks[0] if len(set(self.ranks)) == 1 else None

    def rows_of(self, factor: str) -> int:
        """Rank columns that factor "A" or "B" stores."""
        if factor == self.tied:
            return self.ranks[0] + self.always_on
        return self.columns


def resolve_layout(
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    ranks: Sequence[int] | None,
    always_on: int,
    tied: str | None,
) -> RankLayout:
    """The layout that the factors, the gate and the keyword arguments agree on, or a ValueError."""
    if tied not in TIED:
        raise ValueError(f"unknown tied {tied!r}; known values: None, 'A', 'B'")
    for name, factor in (("A", A), ("B", B)):
        if factor.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {tuple(factor.shape)}")
    sizes = {"A": A.shape[0], "B": B.shape[1]}
    total = sizes["B"] if tied == "A" else sizes["A"]
    if not 0 <= always_on <= min(sizes.values()):
        raise ValueError(
            f"always_on is {always_on}; it must lie between 0 and {min(sizes.values())}, "
            "the number of rank columns"
        )
    layout = RankLayout(
        _split(total - always_on, sizes, gate, ranks, always_on, tied), always_on, tied
    )
    for name, size in sizes.items():
        expected = layout.rows_of(name)
        if size != expected:
            shape = "A (R, d_in)" if name == "A" else "B (d_out, R)"
            raise ValueError(
                f"{shape} has {size} rank columns, expected {expected} for "
                f"ranks {list(layout.ranks)}, always_on={always_on}, tied={tied!r}"
            )
    if gate is None and tied is None:
        return RankLayout((), total)
    if gate is not None and gate.shape[-1] not in (layout.experts, layout.routed):
        raise ValueError(
            f"gate has {gate.shape[-1]} columns, expected {layout.experts} (one per expert)"
            + ("" if tied else f" or {layout.routed} (one per routed rank column)")
        )
    return layout


def _split(
    routed: int,
    sizes: dict[str, int],
    gate: Tensor | None,
    ranks: Sequence[int] | None,
    always_on: int,
    tied: str | None,
) -> tuple[int, ...]:
    if ranks is not None:
        split = tuple(int(r) for r in ranks)
        if any(r < 1 for r in split):
            raise ValueError(f"ranks must be positive, got {list(split)}")
        if tied and len(set(split)) > 1:
            raise ValueError(f"tied={tied!r} needs experts of one rank, got ranks {list(split)}")
        if sum(split) != routed:
            raise ValueError(
                f"ranks {list(split)} add up to {sum(split)}, "
                f"but there are {routed} routed rank columns"
            )
        per_rank = gate is not None and not tied and gate.shape[-1] == routed
        return (1,) * routed if per_rank else split
    if tied:
        one = sizes[tied] - always_on
        if one == 0 or routed % one:
            raise ValueError(
                f"tied={tied!r}: {routed} routed rank columns are no multiple of "
                f"the shared factor's {one}"
            )
        return (one,) * (routed // one)
    if gate is None:
        return (routed,) if routed else ()
    experts = gate.shape[-1]
    if experts == 0 or routed % experts:
        raise ValueError(
            f"{routed} routed rank columns can't be split equally over the gate's "
            f"{experts} experts; pass ranks for experts of different ranks"
        )
    return (routed // experts,) * experts


def check_operands(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float | Tensor,
    out: Tensor | None,
    layout: RankLayout,
) -> None:
    """Raise a ValueError or TypeError naming the operand whose shape, dtype or device is off."""
    if x.dim() < 1 or x.shape[-1] != A.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (..., {A.shape[1]}) for A {tuple(A.shape)}"
        )
    if out is not None and out.shape != (*x.shape[:-1], B.shape[0]):
        raise ValueError(
            f"out has shape {tuple(out.shape)}, expected {(*x.shape[:-1], B.shape[0])}"
        )
    if isinstance(scale, Tensor) and scale.shape != (layout.columns,):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}, expected ({layout.columns},) or a float"
        )
    if A.dtype != B.dtype:
        raise TypeError(f"A is {A.dtype} and B is {B.dtype}; both factors need one dtype")
    named = {"x": x, "A": A, "B": B, "gate": gate, "scale": scale, "out": out}
    for name, operand in named.items():
        if not isinstance(operand, Tensor):
            continue
        if not operand.is_floating_point():
            raise TypeError(f"{name} is {operand.dtype}; a floating-point tensor is needed")
        if operand.device != x.device:
            raise ValueError(f"{name} is on {operand.device}, but x is on {x.device}")


def spread_gate(gate: Tensor | None, x: Tensor, layout: RankLayout) -> Tensor | None:
    """The gate spread over x's leading dimensions; None where no column is routed."""
    if gate is None:
        if layout.tied is None:
            return None
        gate = torch.ones(layout.experts, dtype=torch.float32, device=x.device)
    lead = x.shape[:-1]
    if len(lead) != 1 and gate.dim() == 2 and gate.shape[0] == lead.numel():
        return gate.reshape(*lead, gate.shape[-1])
    try:
        return gate.expand(*lead, gate.shape[-1])
    except RuntimeError as error:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}, expected {(*lead, gate.shape[-1])}, one that "
            f"broadcasts to it, or {(lead.numel(), gate.shape[-1])}"
        ) from error
