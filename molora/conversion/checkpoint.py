"""Checkpoints of other libraries: a configuration and tensors, read without running any of it."""

import json
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint import check_finite, check_weights_file
from ..config_checks import check_count
from ..hub import local_folder
from ..value_types import is_number

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
# What torch.load raises for a file that is no archive, or no whole one.
BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError)
# They say nothing of what is computed.
DESCRIPTIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "name",
    "peft_type",
    "peft_version",
    "revision",
    "task_name",
    "task_type",
}


@dataclass(frozen=True)
class Checkpoint:
    """A folder of another library.

    Attributes:
        source: as the user named it.
        folder: where it lies.
        config: its adapter_config.json.
        tensors: its weights by name, on the CPU.
    """

    source: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def check_fields(self, used: Iterable[str], fixed: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse fields that say something which the conversion would drop.

        Args:
            used: fields that the caller reads.
            fixed: field -> the values of it that the mixture computes.

        Raises:
            ValueError: another value, or a field that isn't known and isn't empty.
        """
        known = {*used, *DESCRIPTIVE}
        for field, value in self.config.items():
            if field in fixed and value not in fixed[field]:
                allowed = " or ".join(map(repr, fixed[field]))
                raise ValueError(
                    f"{self.source!r} has {field}={value!r}, which a MoLoRA adapter can't express; "
                    f"only {allowed} can be converted."
                )
            if field not in known and field not in fixed and value:
                raise ValueError(
                    f"{self.source!r} has {field}={value!r}, a field that this conversion doesn't "
                    f"know; known: {', '.join(sorted({*used, *fixed}))}."
                )

    def named_by(self, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], Tensor]]:
        """Each tensor, with the match of its name.

        Raises:
            ValueError: a name isn't of that pattern.
        """
        for key, tensor in self.tensors.items():
            match = pattern.fullmatch(key)
            if match is None:
                raise ValueError(
                    f"{self.source!r} holds {key} {tuple(tensor.shape)}, which is neither an "
                    "expert nor a router; it can't be converted."
                )
            yield match, tensor

    def required(self, field: str) -> Any:
        """The value of a field.

        Raises:
            ValueError: the configuration lacks it.
        """
        if field not in self.config:
            raise ValueError(f"{self.source!r} has no {field} in its {CONFIG_NAME}.")
        return self.config[field]

    def count(self, field: str) -> int:
        """The value of a field that counts something.

        Raises:
            ValueError: the configuration lacks it, or it is no whole number of at least 1.
        """
        value = self.required(field)
        check_count(1)(f"{self.source!r}: {field}", value)
        return int(value)

    def number(self, field: str) -> float:
        """The value of a field that is multiplied by.

        Raises:
            ValueError: the configuration lacks it, or it is no finite number.
        """
        value = self.required(field)
        if not is_number(value):
            raise ValueError(f"{self.source!r}: {field}={value!r} must be a finite number.")
        return value


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read a folder, or a repository of the Hub.

    Pickled files are read as tensors only (`torch.load` with weights_only=True).

    Raises:
        ValueError: a file is missing, is broken, or holds more than tensors of finite numbers.
    """
    folder = local_folder(source)
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{source} has no {CONFIG_NAME}, so it is no adapter that is known.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} isn't JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, and no fields.")
    return Checkpoint(str(source), folder, config, read_tensors(folder))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of an adapter's folder; errors are `read_checkpoint`'s."""
    path = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has none of {', '.join(WEIGHTS_NAMES)}.")
    tensors = _load_safely(path)
    check_finite(str(folder), tensors)
    return tensors


def _load_safely(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        check_weights_file(path.parent)
        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN as error:
        raise ValueError(
            f"{path} can't be read as tensors alone; it is broken, or holds objects that would run "
            f"code: {next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ValueError(f"{path} doesn't hold a mapping of names to tensors.")
    return {name: tensor.detach() for name, tensor in loaded.items()}
