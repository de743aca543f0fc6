"""X-LoRA (arXiv 2402.07148): a first pass without adapters weighs them in the second."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..sites import Site
from .base import Composer, register_composer, trained_or_frozen
from .sources import LoraAdapter


@register_composer("x-lora")
class XLora(Composer):
    """w = softmax(f(H) / temperature) for each token and all modules, H the base model's last
    hidden state, f a linear map or one hidden layer: see `FirstPassRouter` for its cost. It starts
    at random: train it before use.

    Deviations from PEFT's: no dropout in f, no weights for each layer, and no second softmax over
    what `top_k` leaves.

    Args:
        hidden_size: of f; None for a linear map, which is PEFT's xlora_depth=1.
        top_k: experts that keep their weight, the others get 0, nothing is renormalised (PEFT's
            top_k_lora); None for all.
        temperature: see above.
        train_experts: whether the adapters train on, too (PEFT's use_trainable_adapters).
    """

    needs_training = True

    def __init__(
        self,
        *,
        hidden_size: int | None = None,
        top_k: int | None = None,
        temperature: float = 1.0,
        train_experts: bool = False,
    ) -> None:
        self.options = {"hidden_size": hidden_size, "temperature": temperature}
        self.top_k = top_k
        self.train_experts = train_experts

    def check(
        self, base_model: nn.Module, adapters: Sequence[LoraAdapter], sites: Sequence[Site]
    ) -> None:
        config: Any = getattr(base_model, "config", None)
        if isinstance(config, PreTrainedConfig):
            config = config.get_text_config()  # of a model that also sees, where it has one
        width = getattr(config, "hidden_size", None)
        deciding = sites[0]
        if width is not None and deciding.in_features != width:
            raise ValueError(
                f"router='x-lora' needs the module that runs first to be as wide as the model, "
                f"{width}, and {deciding.name!r} has {deciding.in_features} inputs; add an adapter "
                "of q_proj, say, or use another router."
            )

    def settings(self, adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
        few = {"gate": "top_k_unnormalized", "top_k": self.top_k}
        return {
            "router": "first_pass",
            "router_options": self.options,
            "router_scope": "model",
            **({"gate": "dense"} if self.top_k is None else few),
            **trained_or_frozen(self.train_experts),
        }
