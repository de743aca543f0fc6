"""A pass of the base model without its adapters, ahead of the one that is asked for (X-LoRA)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from .passes import Pass


@torch.no_grad()
def read_ahead(module: nn.Module, given: Pass, values: Mapping[str, Any]) -> Tensor | None:
    """(batch, columns, d) the last hidden state of the base model alone, for this pass's tokens.

    It is formed before the pass begins, so nothing in it is run again by checkpointed layers. Where
    the pass writes or reads a KV cache, the first pass has one of its own, which is kept beside it
    and follows it through beam search and the rest: decoding gives what one pass over the whole
    sequence gives.

    Tokens that train keep what they have learnt: a pass that is given embeddings has it in them.

    Args:
        module: the base model.
        given: what the pass was given.
        values: the arguments of its forward by name.

    Returns:
        None where no adapter is at work.

    Raises:
        ValueError: the base model isn't a decoder-only model of transformers.
        RuntimeError: the pass continues a cache that was filled without this adapter, or its mask
            is for a cache of another kind.
    """
    found: list[BaseTunerLayer] = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    layers = [m for m in found if not isinstance(m, TrainableTokensLayer)]
    layers = [layer for layer in layers if not (layer.disable_adapters or layer.merged)]
    if not layers:
        return None
    backbone = getattr(module, "base_model", None)
    if backbone is None or given.encoder_decoder:
        raise ValueError(
            "the router 'first_pass' reads the last hidden state of a decoder-only model of "
            f"transformers; {type(module).__name__} isn't one. Use another router."
        )
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    arguments = {name: values[name] for name in names if values.get(name) is not None}
    arguments["use_cache"] = given.cached
    if given.cached:
        arguments["past_key_values"] = _own_cache(module, given)
    with _alone(module, layers):
        # The hooks of the base model belong to the pass that is asked for.
        call = backbone.forward if backbone is module else backbone
        hidden: Tensor = call(**arguments).last_hidden_state
    return hidden


def _own_cache(module: nn.Module, given: Pass) -> DynamicCache:
    if given.unread_mask:
        raise RuntimeError(
            "the router 'first_pass' keeps a dynamic cache beside the given one, whose attention "
            "mask isn't (batch, sequence); generate with a dynamic cache, which is the default."
        )
    own = None if given.kept is None else given.kept.ahead
    if own is None and not given.first:
        own = DynamicCache(config=cast(PreTrainedConfig, module.config))
    if own is None or int(own.get_seq_length()) != given.first:
        raise RuntimeError(
            "the pass continues a cache that the router 'first_pass' has not followed: it was "
            "filled without this adapter or without use_cache=True, made from a copy of the states "
            "alone, or cut by hand. Copy caches by copy.deepcopy, or start from the whole sequence."
        )
    assert given.kept is not None
    given.kept.ahead = own
    return own


@contextmanager
def _alone(module: nn.Module, layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Without those adapters, and without checkpointing, which is of no use in this pass."""
    checkpointed = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer._disable_adapters = True
    for part in checkpointed:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        for part in checkpointed:
            part.gradient_checkpointing = True  # type: ignore[assignment]
