"""What a forward pass knows beyond the hidden states, captured once for all layers."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .auxiliary import LossScale
from .first_pass import read_ahead
from .passes import Pass, keep_decisions, read_pass
from .prompt_merging import merges_of
from .routing import Routing, is_recomputation
from .stats import RoutingStatistics


class RoutingContext:
    """The state that the layers of one base model share: masks, loss scale, who is listening.

    A pre-hook on the base model fills it, so a bare model, `generate`, any trainer and
    transformers' own adapter integration all pass through it. Layers only read.

    A forward with gradients writes both slots, one without writes only the slot for inference: what
    a checkpointed layer reads when it is recomputed in backward must survive a reference model's or
    an evaluation's forward in between. Of several passes before one backward, the one whose output
    backward has come to is put back into its slot: its layers are recomputed next.
    """

    def __init__(self) -> None:
        self.loss_scale = LossScale()
        self.statistics: RoutingStatistics | None = None
        self.callback: Any = None  # the RoutingCallback of the training in progress
        self.records: dict[str, list[Routing]] | None = None
        self.standing_labels: Mapping[str, Tensor] = {}  # of molora.routing_labels
        self.follows_cache = False  # some router asks what the cache holds
        self.looks_ahead = False  # some router reads a first pass without the adapter
        self.decides_once = False  # some router decides once for a sequence or a task
        self.merges_prompts = True  # whether such decisions are merged for decoding
        self.static = False  # whether layers compute with what stands in for their routing
        self._with_gradients = Pass()
        self._without_gradients = Pass()
        self._trains = True
        self._not_finite: dict[str, Tensor] = {}
        self._warned = False

    def install(self, model: nn.Module) -> tuple[RemovableHandle, ...]:
        """Capture at the start of each of the model's forward passes, forget at its end.

        Parts of it may run by themselves too: TRL's DistillationTrainer leaves out the head, and
        `generate` runs an encoder alone. Such a pass is captured like one of the whole.
        """
        handles = [*self._hook(model, self._capture)]
        for part in _parts(model):
            handles += self._hook(part, self._capture_part)
        return tuple(handles)

    def _hook(self, module: nn.Module, capture: Any) -> tuple[RemovableHandle, RemovableHandle]:
        # Read once, from the module's own forward: trainers may wrap it in one that takes **kwargs.
        accepted = tuple(inspect.signature(module.forward).parameters)
        return (
            module.register_forward_pre_hook(partial(capture, accepted), with_kwargs=True),
            module.register_forward_hook(self._forget, with_kwargs=True),
        )

    def _capture(
        self, accepted: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        given, kwargs = read_pass(
            module, accepted, args, kwargs, self.standing_labels, self.follows_cache
        )
        self._without_gradients = given  # from here on what the model runs is inside of the pass
        if self.looks_ahead:
            values = {**kwargs, **dict(zip(accepted, args, strict=False))}
            given.ahead = read_ahead(module, given, values)
        if self.decides_once and self.merges_prompts and self.records is None:
            given.merges = merges_of(given)
        self._trains = torch.is_grad_enabled()
        if self._trains:
            self._with_gradients = given
        return args, kwargs

    def _capture_part(
        self, accepted: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self._without_gradients.module in (None, module):
            return self._capture(accepted, module, args, kwargs)
        return None  # in a pass of the whole

    def _forget(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._without_gradients.module is not module:
            return  # a part, in a pass of the whole
        keep_decisions(self._without_gradients, kwargs, output)
        for carry in self._without_gradients.carries.values():
            carry.end_pass()
        if self._trains and not torch.compiler.is_compiling():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._recompute, self._with_gradients))
        # What runs outside of all passes isn't described by the one before. What a backward will
        # recompute stays.
        self._without_gradients = Pass()

    def _recompute(self, given: Pass, grad: Tensor) -> None:
        """Backward has come to the output of that pass, and goes on into its layers."""
        self._with_gradients = given

    def given(self) -> Pass:
        """What the pass in progress, or the one that is being recomputed, was given.

        Nothing, where a layer runs outside of the passes that are captured.
        """
        if not torch.is_grad_enabled():
            return self._without_gradients
        outside = self._without_gradients.module is None
        # Asked in this order, because torch.compile breaks its graph at `is_recomputation`.
        if outside and not torch.compiler.is_compiling() and not is_recomputation():
            self._with_gradients = Pass()  # backward may run those layers again
        return self._with_gradients

    def token_mask(self, name: str, hidden: Tensor) -> Tensor | None:
        """Which rows of the flattened `hidden` are real tokens.

        Args:
            name: "attention_mask" or "decoder_attention_mask".
            hidden: (..., d_in) a site's input.

        Returns:
            (T,) bool, or None when every row counts.
        """
        given = self.given()
        mask = given.masks.get(name)
        if mask is None:
            return None
        shape = hidden.shape[:-1]
        if shape != mask.shape:
            if len(shape) == 1 and shape[0] == mask.shape[0] != mask.numel():
                return None  # one row per sequence, such as a pooled output
            if mask.numel() != shape.numel():
                self._warn(name, mask, hidden)
                return None
        return given.flat_mask(name, hidden.device)

    def counting(self) -> RoutingStatistics | None:
        """The statistics that the pass in progress belongs into, if anyone wants them.

        A pass of the model without gradients, such as a reference policy's, doesn't train and isn't
        counted; nor is the recomputation of a checkpointed layer. (The first pass of a layer under
        reentrant checkpointing has no gradients either, but its model's pass has.)
        """
        # Asked first, because torch.compile breaks its graph at `is_recomputation`.
        if self.statistics is None or not self._trains or is_recomputation():
            return None
        return self.statistics

    @property
    def runs_again(self) -> bool:
        """Whether a layer that runs now is in the first pass of reentrant checkpointing."""
        return self._trains and not torch.is_grad_enabled()

    def check_finite(self, site: str, logits: Tensor) -> None:
        """Stop training at the first router whose logits aren't finite.

        On an accelerator looking would wait for the device, so there the finding stays on it until
        `raise_if_not_finite`, which molora's trainer hook calls after each optimizer step.

        Raises:
            FloatingPointError: the logits, in host memory, aren't finite.
        """
        if torch.compiler.is_compiling():
            return
        found = ~torch.isfinite(logits.detach()).all()
        self._not_finite[site] = found | self._not_finite.get(site, found)
        if logits.device.type == "cpu":
            self.raise_if_not_finite(site)

    def raise_if_not_finite(self, site: str | None = None) -> None:
        """Raise `FloatingPointError` if the sites' (or that site's) logits weren't finite."""
        found = self._not_finite if site is None else {site: self._not_finite[site]}
        flags = list(found.values())
        # The layers of one model may be on several devices.
        if not flags or not torch.stack([flag.to(flags[0].device) for flag in flags]).any():
            return
        bad = [name for name, flag in found.items() if flag]
        self._not_finite.clear()
        raise FloatingPointError(
            f"the router logits of the site {bad[0]!r} are not finite"
            + (f" (and of {len(bad) - 1} more)" if len(bad) > 1 else "")
            + "; the run has diverged. Lower the learning rate, clip gradients, or add "
            "losses={'z_loss': 1e-3}."
        )

    def _warn(self, name: str, mask: Tensor, hidden: Tensor) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"molora: a routed layer read an input of shape {tuple(hidden.shape)}, which "
                f"{name} of shape {tuple(mask.shape)} does not describe; losses and statistics "
                "count all of its rows.",
                stacklevel=2,
            )


@contextmanager
def with_changed(
    contexts: Sequence[RoutingContext], name: str, change: Callable[[Any], Any]
) -> Iterator[None]:
    """Inside, an attribute of the contexts is what `change` makes of its value before."""
    before = [getattr(context, name) for context in contexts]
    for context, value in zip(contexts, before, strict=True):
        setattr(context, name, change(value))
    try:
        yield
    finally:
        for context, value in zip(contexts, before, strict=True):
            setattr(context, name, value)


def _parts(model: nn.Module) -> list[nn.Module]:
    """The model without its head, and its encoder, as far as it has them."""
    found = [getattr(model, "base_model", None)]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found.append(model.get_encoder())  # type: ignore[operator]
    return [part for part in found if isinstance(part, nn.Module) and part is not model]


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors among what a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
