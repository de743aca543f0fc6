"""DUME (gensyn-ai/dume): by a regression on whose data a token is of."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .base import NOTHING, Gates, register_composer
from .fitting import Batches
from .prototypes import PrototypeComposer
from .ridge import fit_ridge


@register_composer("dume")
class Dume(PrototypeComposer):
    """See `DumeRouter`; `gates` holds (w, b) (d_in + 1,) by site for each adapter.

    DUME takes the best expert alone; at its temperature of 0.1 a second one counts only where the
    two nearly tie.
    """

    data = "each"
    fitted = "gates"
    gates_from = "molora.fit_ridge"

    def __init__(
        self, *, top_k: int = 2, temperature: float = 0.1, gates: Gates | None = None
    ) -> None:
        super().__init__(top_k, temperature, gates)

    @classmethod
    def fit(
        cls,
        base_model: nn.Module,
        adapters: Sequence[str],
        batches: Sequence[Batches],
        chosen: Mapping[str, Any] = NOTHING,
    ) -> dict[str, Any]:
        return {"gates": fit_ridge(base_model, adapters, batches)}
