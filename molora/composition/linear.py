"""A linear router over frozen adapters, to be trained."""

from collections.abc import Sequence
from typing import Any

from .base import Composer, register_composer, top_k_settings
from .sources import LoraAdapter


@register_composer("linear")
class Linear(Composer):
    """Top-k of a linear map of a site's input, which starts at random: train it before use."""

    needs_training = True

    def __init__(self, *, top_k: int = 2, temperature: float = 1.0) -> None:
        self.top_k = top_k
        self.temperature = temperature

    def settings(self, adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
        options = {"temperature": self.temperature}
        return {
            "router": "linear",
            "router_options": options,
            **top_k_settings(self.top_k, adapters),
        }
