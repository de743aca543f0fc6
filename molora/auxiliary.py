"""Auxiliary losses that reach the gradient under any trainer, and the scale they need there.

A trainer that computes its own loss never sees `outputs.loss`, so the losses are attached to
activations instead: an identity on the layer's result whose backward sends a gradient of 1 into the
loss. That works in a bare loop, in transformers' and TRL's trainers, under both kinds of
gradient checkpointing, in DDP and in FSDP, and it holds no tensor between forward and backward.
"""

from typing import Any

import torch
from torch import Tensor


class LossScale:
    """Turns an auxiliary loss into what must enter backward beside the task's loss.

    A trainer that accumulates over n micro-batches adds up n attached losses: each counts 1/n, and
    a gradient scaler for fp16 multiplies it as it does the task's loss. Under
    `transformers.Trainer` both are known from a callback that molora registers, and n is smaller in
    the last window of an epoch (not where the data set has no length: there every n is
    `gradient_accumulation_steps`). Under a bare `accelerate` loop n is its
    `gradient_accumulation_steps`, by which it divides the task's loss in that last window too. A
    plain PyTorch loop that accumulates, and any bare loop with a gradient scaler, calls
    `molora.set_gradient_accumulation(model, n, scaler)`.
    """

    def __init__(self) -> None:
        self._chosen: tuple[int, Any] | None = None
        self._trainer: tuple[int, Any] | None = None

    def choose(self, steps: int | None, scaler: Any) -> None:
        """What a loop says of itself; None for `steps` goes back to following the trainer."""
        self._chosen = None if steps is None else (steps, scaler)

    def start_window(self, batches: int, optimizer: Any) -> None:
        """A Trainer starts on that many micro-batches, which end in one optimizer step."""
        self._trainer = (batches, getattr(optimizer, "scaler", None))

    def end_window(self) -> None:
        """The Trainer has made the step. An exception that ends its run before the next one leaves
        nothing to a loop that comes after it."""
        self._trainer = None

    def __call__(self, loss: Tensor) -> Tensor:
        """The loss () of the micro-batch that is in its forward pass now, scaled."""
        batches, scaler = self._chosen or self._trainer or (_steps_of_accelerate(), None)
        loss = loss / batches
        return loss if scaler is None else scaler.scale(loss)


def _steps_of_accelerate() -> int:
    from accelerate.state import GradientState

    return GradientState().num_steps


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.dtype, loss.device
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.loss
        return grad, torch.ones((), dtype=dtype, device=device)


def attach(result: Tensor, loss: Tensor) -> Tensor:
    """`result`, unchanged; its backward also runs the backward of `loss` ()."""
    return _Attach.apply(result, loss)
