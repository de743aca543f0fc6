"""Modules whose weight is read past them, so that experts there would change nothing."""

from collections.abc import Iterable

import torch
from torch import nn

# By transformers' model type: what Mamba's kernels and formulas, and WavLM's attention, take as
# arguments (in transformers 5.23).
SELECTIVE_SCAN = ("x_proj", "dt_proj", "out_proj")
CHUNK_SCAN = ("out_proj",)
READ_BY_MODEL = {
    "mamba": SELECTIVE_SCAN,
    "falcon_mamba": SELECTIVE_SCAN,
    "jamba": ("dt_proj",),
    "mamba2": CHUNK_SCAN,
    "bamba": CHUNK_SCAN,
    "falcon_h1": CHUNK_SCAN,
    "granitemoehybrid": CHUNK_SCAN,
    "nemotron_h": CHUNK_SCAN,
    "zamba2": CHUNK_SCAN,
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def refuse_bypassed(model: nn.Module, names: Iterable[str]) -> None:
    """Raise `ValueError` where a target's weight is read without calling the module."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    read = READ_BY_MODEL.get(model_type, ())
    for name in names:
        path, _, child = name.rpartition(".")
        parent = model.get_submodule(path)
        if child in read:
            reader = f"a {model_type!r} model reads the weight of its {', '.join(read)}"
        elif isinstance(parent, nn.MultiheadAttention):
            reader = "torch.nn.MultiheadAttention reads the weight of its out_proj"
        elif isinstance(parent, nn.TransformerEncoderLayer) and _has_fast_path():
            raise ValueError(
                f"torch.nn.TransformerEncoderLayer reads the weight of {name!r} past the module "
                "and its experts in eval mode; call torch.backends.mha.set_fastpath_enabled(False) "
                "first."
            )
        else:
            continue
        raise ValueError(
            f"{name!r} can't have experts: {reader} past the module; leave that out of "
            "target_modules, or put it into exclude_modules."
        )


def _has_fast_path() -> bool:
    return bool(torch.backends.mha.get_fastpath_enabled())
