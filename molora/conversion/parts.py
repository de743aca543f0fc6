"""What a format's reader makes of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Parts:
    """An adapter before it has been put together.

    Attributes:
        method: the published method whose definition the configuration starts from.
        fields: what differs from it.
        tensors: by name within the base model, such as "model.layers.0.mlp.molora_router.weight".
        notes: what the user should know of the conversion; they go into the model card.
    """

    method: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_experts(self, name: str, downs: list[Tensor], ups: list[Tensor]) -> None:
        """Stack A_e (r, d_in) and B_e (d_out, r) of all experts of a module.

        Raises:
            ValueError: they are no matrices of one d_in and one d_out.
        """
        for factor, found, dim in (("A", downs, 1), ("B", ups, 0)):
            if any(part.dim() != 2 or part.shape[dim] != found[0].shape[dim] for part in found):
                shapes = ", ".join(str(tuple(part.shape)) for part in found)
                raise ValueError(f"{name}.{factor} has experts of unlike shapes: {shapes}.")
        self.tensors[f"{name}.A"] = torch.cat(downs)
        self.tensors[f"{name}.B"] = torch.cat(ups, dim=1)


def in_order(found: Mapping[int, Any], count: int, what: str) -> list[Any]:
    """The values of 0, 1, ... count - 1.

    Raises:
        ValueError: one is missing, or there are more.
    """
    if sorted(found) != list(range(count)):
        raise ValueError(f"{what} has experts {sorted(found)}, and 0 to {count - 1} are needed.")
    return [found[number] for number in range(count)]
