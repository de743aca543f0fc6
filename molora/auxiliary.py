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
    registers; under a bare `accelerate` loop n comes from its `gradient_accumulation_steps`; a
    plain PyTorch loop that accumulates calls `molora.set_gradient_accumulation(model, n)`.
    """

    def __init__(self) -> None:
        self.accumulation_steps: int | None = None
        self._trainer_steps: int | None = None
        self._optimizer: Any = None

    def start_training(self, accumulation_steps: int, optimizer: Any) -> None:
        """A Trainer begins: follow its accumulation and its gradient scaler."""
        self._trainer_steps, self._optimizer = accumulation_steps, optimizer

    def stop_training(self) -> None:
        """The Trainer is done."""
        self._trainer_steps = self._optimizer = None

    def value(self) -> float:
        """The factor for the micro-batch that is in its forward pass now."""
        if self.accumulation_steps is not None:
            return 1.0 / self.accumulation_steps
        if self._trainer_steps is not None:
            scaler = getattr(self._optimizer, "scaler", None)
            return (1.0 if scaler is None else scaler.get_scale()) / self._trainer_steps
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
