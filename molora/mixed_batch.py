"""A batch that mixes adapters: PEFT's `adapter_names`, one for each of its rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layer import MoloraLayer


def check_names(
    names: list[str], known: set[str], num_beams: int, encoder_decoder: bool
) -> list[str]:
    """The adapter of each row that the layers see, of each beam where there are several.

    Raises:
        ValueError: an adapter isn't there, or the model can't tell the beams' rows.
    """
    unknown = set(names) - known - {"__base__"}
    if unknown:
        raise ValueError(
            f"adapter_names holds {sorted(unknown)}; the adapters of this model are "
            f"{sorted(known)}."
        )
    if num_beams > 1 and encoder_decoder:
        raise ValueError("adapter_names with beam search needs a decoder-only model.")
    return [name for name in names for _ in range(num_beams)]


@contextmanager
def handed_to_layers(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Inside, each layer with adapters is called with the names."""
    hook = partial(_add_names, adapter_names=names)
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, MoloraLayer | AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_names(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple, dict[str, Any]]:
    if isinstance(module, AuxiliaryTrainingWrapper):  # of PEFT, and wants to know every name
        adapter_names = [n if n in module._adapters else "__base__" for n in adapter_names]
    return args, {**kwargs, "adapter_names": adapter_names}
