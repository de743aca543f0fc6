"""A merged model as an ordinary folder."""

from pathlib import Path
from typing import Any, cast

from ..config import MoloraConfig
from ..layer import adapted_layers
from .card import write_card
from .folder import new_folder
from .peft_folder import Source


def save_merged(
    model: Any,
    out_dir: str | Path,
    tokenizer: Any = None,
    *,
    adapter_name: str = "default",
    overwrite: bool = False,
) -> Path:
    """`merge_and_unload` (which uses the model up), and the result as a folder with a model card.

    Args:
        model: a PEFT model with the adapter.
        out_dir: folder to be made; it appears when everything in it is written.
        tokenizer: is written beside it.
        adapter_name: which adapter.
        overwrite: replace a folder that isn't empty.

    Raises:
        ValueError: something is routed by token, and nothing static stands for it.
        FileExistsError: the folder isn't empty.
    """
    layers = adapted_layers(model, adapter_name)
    config = cast(MoloraConfig, model.peft_config[adapter_name])
    source = Source(model, adapter_name, config, layers)
    found = [layer.static_mixture(adapter_name) for layer in layers.values()]
    notes = [
        f"{'Exact' if mixture.exact else 'An approximation of token routing'}: {mixture.source}."
        for mixture in found
        if mixture is not None
    ]
    with new_folder(out_dir, overwrite) as folder:
        model.merge_and_unload(safe_merge=True, adapter_names=[adapter_name]).save_pretrained(
            folder
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        title = "A model with its adapter folded in"
        write_card(folder, title, source, dict.fromkeys(notes), library="transformers")
    return Path(out_dir)
