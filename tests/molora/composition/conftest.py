"""A tiny base model, and three saved adapters of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from .dense_mixture import SPECS
from .regression import regression_model


@pytest.fixture(scope="module")
def base(tiny_model) -> Callable[[], Any]:
    return lambda: tiny_model("llama").double()


@pytest.fixture(scope="module")
def folders(base, save_loras, tmp_path_factory) -> list[str]:
    """The three adapters, saved."""
    return save_loras(base, SPECS, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def batch(tiny_batch) -> dict[str, Tensor]:
    return {key: tiny_batch("llama")[key] for key in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def regression_folders(tmp_path_factory) -> list[str]:
    """Of a `Regression`: two adapters of its first map and one of both."""
    root = tmp_path_factory.mktemp("loras")
    for i, targets in enumerate([["up"], ["up"], ["up", "down"]]):
        torch.manual_seed(i)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
        model = get_peft_model(regression_model(), config, autocast_adapter_dtype=False)
        model.save_pretrained(root / str(i))
    return [str(root / str(i)) for i in range(3)]
