"""A state that routers hand from layer to layer within one pass, whatever is checkpointed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Slot:
    """What one site took and left. `leaf` is the copy of its state that the next site read where no
    graph led there; the gradient gathers in it."""

    before: str | None
    with_graph: bool
    state: Tensor | None = None
    learns: bool = False
    leaf: Tensor | None = None


class LayerCarry:
    """The states of one chain of sites, in the order in which they run.

    Without checkpointing, and with the non-reentrant kind, a state is read as it is and its
    gradient flows through the graph; what a layer reads when it is run again are the same numbers.

    Reentrant checkpointing makes no graph in the forward pass, and in backward it gives a layer's
    gradient to the layer's arguments alone, of which the state is none. There the site reads a
    leaf, whose gradient is complete when the layer's own backward ends. The layer before runs after
    that, and adds it to the gradient of the state that it computes anew. So the gradient is exact
    in every case.
    """

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}
        self._last: str | None = None

    def take(self, site: str, again: bool) -> Tensor | None:
        """The state that the site before has left; None for the first.

        Args:
            site: the name of the one that asks.
            again: it is a checkpointed layer's run in backward.

        Raises:
            RuntimeError: the site runs twice in one pass, or not in the pass that is run again.
        """
        if not again:
            if site in self._slots:
                raise RuntimeError(
                    f"the site {site!r} runs twice in one pass, so there is no one layer before it."
                )
            self._slots[site] = _Slot(self._last, torch.is_grad_enabled())
        slot = self._slots.get(site)
        if slot is None:
            raise RuntimeError(
                f"the site {site!r} is run again for a pass in which it didn't run. Of several "
                "passes, backward must come to their outputs one by one; call it for each, or "
                "don't checkpoint."
            )
        if slot.before is None:
            return None
        previous = self._slots[slot.before]
        state = previous.state
        assert state is not None, "a site that ran has left a state"
        if not torch.is_grad_enabled() or (previous.with_graph and not previous.learns):
            return state
        if again and slot.with_graph:
            return state.detach().requires_grad_()
        if state.requires_grad:
            return state
        previous.leaf = state.detach().requires_grad_()
        return previous.leaf

    def leave(self, site: str, state: Tensor, logits: Tensor, again: bool) -> Tensor:
        """Leave the state for the site after.

        Returns:
            The logits, unchanged; their backward also runs the state's.
        """
        slot = self._slots[site]
        if not again:
            slot.state, slot.learns = state, state.requires_grad
            self._last = site
        if not torch.is_grad_enabled() or (again and slot.with_graph):
            return logits
        return _ReceiveGradient.apply(logits, state, slot)

    def end_pass(self) -> None:
        """The forward is over: keep the numbers, for layers that are run again, not the graphs."""
        for slot in self._slots.values():
            slot.state = None if slot.state is None else slot.state.detach()


class _ReceiveGradient(torch.autograd.Function):
    """Identity on the logits; gives the state the gradient of its leaf, if it has one."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, state: Tensor, slot: _Slot) -> Tensor:
        ctx.slot = slot
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        # Once: another backward may end here, without the layer above, which had left it.
        leaf, ctx.slot.leaf = ctx.slot.leaf, None
        return grad, None if leaf is None else leaf.grad, None
