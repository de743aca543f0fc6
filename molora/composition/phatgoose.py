"""PHATGOOSE (arXiv 2402.05859): by gates that were trained with the adapters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import NOTHING, Gates, register_composer
from .fitting import Batches, lora_output, minimize
from .prototypes import PrototypeComposer
from .sources import read_loras


@register_composer("phatgoose")
class Phatgoose(PrototypeComposer):
    """See `PhatgooseRouter`; `gates` holds v (d_in,) by site for each adapter."""

    data = "each"
    fitted = "gates"
    gates_from = "molora.fit_gates"

    def __init__(
        self, *, top_k: int = 2, temperature: float = 1.0, gates: Gates | None = None
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
        pairs = zip(adapters, batches, strict=True)
        return {"gates": [fit_gates(base_model, adapter, given) for adapter, given in pairs]}


def fit_gates(
    base_model: nn.Module,
    adapter: str | Path,
    batches: Batches,
    *,
    steps: int = 100,
    learning_rate: float = 5e-3,
) -> dict[str, Tensor]:
    """PHATGOOSE's gates of one adapter, learned on its own data (arXiv 2402.05859).

    At each site y = W x + sigmoid(<v, x>) s B A x, where v (d_in) starts at 0 and all else is
    frozen; the published numbers of steps and learning rate are the defaults, the optimizer is
    AdamW without decay.

    Args:
        base_model: the model that the adapter was trained on; it is left as it was.
        adapter: its folder or Hub name.
        batches: keyword arguments of the model's forward, with labels; repeated if there are fewer
            than steps.
        steps: optimizer steps, one batch each.
        learning_rate: of the gates.

    Returns:
        v (d_in,) by site, in fp32 (fp64 for fp64 models), for `molora.compose(gates=...)`.

    Raises:
        ValueError: the adapter can't be composed, there is no batch, the model gives no loss, or an
            option is out of range.
    """
    (lora,), _ = read_loras(base_model, [adapter])
    place = next(base_model.parameters())
    wide = torch.promote_types(place.dtype, torch.float32)
    gates = {
        site: torch.zeros(A.shape[1], device=place.device, dtype=wide, requires_grad=True)
        for site, (A, _) in lora.factors.items()
    }

    def added(site: str, x: Tensor) -> Tensor:
        x = x.to(wide)
        return (x @ gates[site]).sigmoid()[:, None] * lora_output(lora, site, x)

    minimize(base_model, lora.factors, added, list(gates.values()), batches, steps, learning_rate)
    return {site: gate.detach() for site, gate in gates.items()}
