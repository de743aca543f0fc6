"""The weights of a model, read one at a time."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..hub import local_folder

INDEX_NAME = "model.safetensors.index.json"


class Weights:
    """Names and values of a model's tensors.

    Attributes:
        source: where they are from, for messages.
    """

    def __init__(self, source: str, places: dict[str, Any]) -> None:
        self.source = source
        # A tensor, or the open file that it is in.
        self._places = places

    def names(self) -> list[str]:
        """In the model's own order, where it is known."""
        return list(self._places)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ValueError: there is none of that name, or it isn't of floating point.
        """
        if name not in self._places:
            raise ValueError(
                f"{self.source} has no tensor {name!r}. Where files name tensors otherwise than "
                "the model does, load both models and give them instead."
            )
        place = self._places[name]
        tensor: Tensor = place if isinstance(place, Tensor) else place.get_tensor(name)
        return tensor.detach()


@contextmanager
def opened(model: str | Path | nn.Module) -> Iterator[Weights]:
    """The weights of a loaded model, or of its safetensors files, which stay on disk.

    Raises:
        ValueError: the folder has no safetensors files, or one can't be read.
    """
    if isinstance(model, nn.Module):
        yield Weights(type(model).__name__, dict(model.state_dict()))
        return
    folder = local_folder(model)
    index = folder / INDEX_NAME
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = sorted(set(places.values()))
    else:
        paths = sorted(path.name for path in folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(
            f"{model} has no safetensors files; load both models and give them instead."
        )
    with ExitStack() as stack:
        files = [stack.enter_context(_open(folder / path)) for path in paths]
        yield Weights(str(model), {name: file for file in files for name in file.keys()})  # noqa: SIM118


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing, corrupted or incomplete: {error}.") from error
