"""Base models by name: their class and configuration, and their modules without weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn


def architecture(source: str) -> tuple[Any, Any]:
    """The model's class and configuration.

    Raises:
        ValueError: there is no model of that name.
    """
    import transformers

    path = Path(source)
    if not path.exists() and source.startswith(("/", "./", "../")):
        raise ValueError(f"there is no model at {source}.")
    if path.suffix == ".gguf":
        config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    else:
        config = transformers.AutoConfig.from_pretrained(source)
    names = config.architectures or []
    cls = next((getattr(transformers, name, None) for name in names), None)
    return cls or transformers.AutoModelForCausalLM, config


def empty_model(source: str) -> nn.Module:
    """The model's architecture on the meta device."""
    cls, config = architecture(source)
    with torch.device("meta"):
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
