"""Where a site sits in its model: the number of its layer, and the modules that read its input."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

# Projections that read the same tensor when they stand side by side in one module, in the order in
# which they run. A name that isn't listed decides for itself, and every site checks its input
# against its block's at run time.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# In cross-attention the queries come from the decoder, keys and values from the encoder.
CROSS_ATTENTION = re.compile(
    r"(?i)(encdecattention|encoder_attn|cross_?attn|cross_?attention)(\.self)?$"
)


@dataclass(frozen=True)
class Site:
    """A module that gets experts.

    Attributes:
        name: its dotted name in the base model.
        layer: the number of its layer, counted over the model from 0; None if it is in no layer.
        in_features: d_in.
        out_features: d_out.
        parts: the adapted linear modules of a site that is a whole feed-forward network; else none.
    """

    name: str
    layer: int | None
    in_features: int
    out_features: int
    parts: tuple["Site", ...] = ()

    @property
    def module(self) -> str:
        """The module's own name, such as "q_proj"."""
        return self.name.rpartition(".")[2]


def block_of(name: str) -> str:
    """A key that is equal for the sites that read the same input."""
    parent, _, child = name.rpartition(".")
    for group in SAME_INPUT:
        if child in group:
            crosses = CROSS_ATTENTION.search(parent)
            if crosses and child == group[0]:
                return name
            members = group[1:] if crosses else group
            return f"{parent}.{'|'.join(members)}"
    return name


def in_run_order(names: Iterable[str]) -> list[str]:
    """Modules in the order of the model, but those that read the same input in the order they run.

    The one that runs first decides for its block, and OPT, BART and Whisper define the keys before
    the queries that they compute first.
    """
    names = list(names)
    keys = {name: _sibling_group(name) for name in names}
    first: dict[tuple[str, int], int] = {}
    for position, name in enumerate(names):
        first.setdefault(keys[name][0], position)
    return sorted(names, key=lambda name: (first[keys[name][0]], keys[name][1]))


def _sibling_group(name: str) -> tuple[tuple[str, int], int]:
    """A key for the module's siblings of the same input, and its place among them."""
    parent, _, child = name.rpartition(".")
    for index, group in enumerate(SAME_INPUT):
        if child in group:
            return (parent, index), group.index(child)
    return (name, -1), 0


def reads_encoder(name: str) -> bool:
    """Whether the site makes keys or values of cross-attention, from the encoder's output."""
    parent, _, child = name.rpartition(".")
    is_key_or_value = any(child in group[1:] for group in SAME_INPUT)
    return is_key_or_value and CROSS_ATTENTION.search(parent) is not None


def reads_decoder(name: str) -> bool:
    """Whether the site, in a model with an encoder and a decoder, reads the decoder's tokens."""
    return "decoder" in name.split(".") and not reads_encoder(name)


def number_layers(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, int | None], int]:
    """The layer of each named module, and the number of layers.

    A layer is an element of the outermost `nn.ModuleList` around the module, whatever the
    architecture calls it (layers, h, block, ...). The stacks of a model with several (T5's encoder
    and decoder) are numbered one after the other, in the order of the model; stacks without any of
    the named modules don't count. In a model without such lists, the children of its outermost
    `nn.Sequential`, or else the modules themselves, are numbered in order.
    """
    names = list(names)
    stacks: dict[str, int] = {}
    places: dict[str, tuple[str, int] | None] = {}
    for name in names:
        place = _outermost(model, name, nn.ModuleList)
        places[name] = place
        if place is not None:
            stacks.setdefault(place[0], len(model.get_submodule(place[0])))  # type: ignore[arg-type]
    if not stacks:
        return _number_without_lists(model, names)
    offsets, total = {}, 0
    for stack, length in stacks.items():
        offsets[stack] = total
        total += length
    layers = {
        name: None if place is None else offsets[place[0]] + place[1]
        for name, place in places.items()
    }
    return layers, total


def _number_without_lists(model: nn.Module, names: list[str]) -> tuple[dict[str, int | None], int]:
    keys = {}
    for name in names:
        place = _outermost(model, name, nn.Sequential)
        keys[name] = name if place is None else f"{place[0]}.{place[1]}"
    order = {key: index for index, key in enumerate(dict.fromkeys(keys.values()))}
    return {name: order[key] for name, key in keys.items()}, len(order)


def _outermost(model: nn.Module, name: str, container: type[nn.Module]) -> tuple[str, int] | None:
    """Name of the outermost container of that type around `name`, and the index inside it."""
    module, path = model, ""
    for part in name.split("."):
        if isinstance(module, container) and part.isdigit():
            return path, int(part)
        module = getattr(module, part)
        path = f"{path}.{part}" if path else part
    return None
