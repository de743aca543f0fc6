"""Experts whose down factor is a frozen sparse random projection (FlyLoRA, arXiv 2510.08396)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import SiteSpec, register_experts
from .lora import LoraExperts
from .start import start_up

LARGEST_SEED = 2**62


@register_experts("sparse_projection")
class SparseProjectionExperts(LoraExperts):
    """Each row of A has round(density * d_in) entries at random places, drawn from N(0, 1 / R^2).

    A (R, d_in) never changes and is no parameter. With `save_projection` it is saved with the
    adapter; without, its seed is, 8 bytes, and A is drawn again when the adapter is loaded, equal
    as long as torch's CPU generator draws the same numbers.

    Args:
        density: share of entries that aren't zero.
        save_projection: save A itself instead of its seed.
    """

    takes_gaussian = False

    A: Tensor  # type: ignore[assignment]  # a buffer here
    seed: Tensor

    def __init__(
        self,
        spec: SiteSpec,
        *,
        density: float = 0.25,
        save_projection: bool = True,
    ) -> None:
        super().__init__(spec)
        if not 0 < density <= 1:
            raise ValueError(f"expert option density={density!r} must be in (0, 1]")
        self.density = density
        self.save_projection = save_projection
        shape = self.A.shape
        del self.A
        self.register_buffer("A", torch.empty(shape), persistent=save_projection)
        if not save_projection:
            self.register_buffer("seed", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        start_up(self.B, init)
        seed = torch.randint(LARGEST_SEED, ())
        if not self.save_projection:
            self.seed = seed.to(self.seed.device)
        self._draw(int(seed))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A.to(self.B.dtype), self.B

    def _draw(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows, columns = self.A.shape
        count = max(1, round(self.density * columns))
        order = torch.rand(rows, columns, generator=generator).argsort(-1)[:, :count]
        values = torch.randn(rows, count, generator=generator) / rows
        drawn = torch.zeros(rows, columns).scatter_(1, order, values)
        self.A = drawn.to(device=self.B.device, dtype=self.A.dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.save_projection and not self.seed.is_meta:
            self._draw(int(self.seed))
