"""Auxiliary losses that reach the gradient under any trainer, and the scale they need there.

A trainer that computes its own loss never sees `outputs.loss`, so the losses are attached to
activations instead: an identity on the layer's result whose backward sends a gradient of `scale`
into the loss. That works in a bare loop, in transformers' and TRL's trainers, under both kinds of
gradient checkpointing, in DDP and in FSDP, and it holds no tensor between forward and backward.
"""

from typing import Any

import torch
from torch import Tensor


class LossScale:
    """What the gradient of an auxiliary loss is multiplied by.

    A trainer that accumulates over n micro-batches adds up n attached gradients: each counts 1/n.
    Under `transformers.Trainer` n and the gradient scaler are known from a callback that molora
    registers, and n is smaller in the last window of an epoch (not where the data set has no
    length: there every n is `gradient_accumulation_steps`). Under a bare `accelerate` loop n is its
    `gradient_accumulation_steps`, by which it divides the task's loss in that last window too. A
    plain PyTorch loop that accumulates calls `molora.set_gradient_accumulation(model, n)`.
    """

    def __init__(self) -> None:
        self.accumulation_steps: int | None = None
        self._trainer: float | None = None

    def start_window(self, batches: int, optimizer: Any) -> None:
        """A Trainer starts on that many micro-batches, which end in one optimizer step.

        Reading the gradient scaler waits for the device, so it is done here, once a step.
        """
        scaler = getattr(optimizer, "scaler", None)
        self._trainer = (1.0 if scaler is None else scaler.get_scale()) / batches

    def stop_training(self) -> None:
        """The Trainer is done."""
        self._trainer = None

    def value(self) -> float:
        """The factor for the micro-batch that is in its forward pass now."""
        if self.accumulation_steps is not None:
            return 1.0 / self.accumulation_steps
        if self._trainer is not None:
            return self._trainer
        from accelerate.state import GradientState

        return 1.0 / GradientState().num_steps


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss = scale, (loss.dtype, loss.device)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.loss
        return grad, torch.full((), ctx.scale, dtype=dtype, device=device), None


def attach(result: Tensor, loss: Tensor, scale: float) -> Tensor:
    """`result`, unchanged; its backward also sends `scale` into `loss` ()."""
    return _Attach.apply(result, loss, scale)
