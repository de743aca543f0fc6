"""MoLE (arXiv 2404.13628): a gate for each layer over frozen adapters; its temperature trains."""

from collections.abc import Sequence
from typing import Any

from ..config_checks import check_not_negative
from .base import Composer, register_composer
from .sources import LoraAdapter


@register_composer("mole")
class Mole(Composer):
    """w = softmax(W_r v / tau) for all tokens of a sequence and all modules of a layer, W_r and tau
    trained, the adapters frozen. It starts at random: train it before use.

    Training adds `balance` times -log of the product of the q_e, q_e being the mean of w_e, which
    is the loss "gate_balance" with the coefficient `balance` * E.

    Deviations: v is the mean of the layer's input over the prompt, an approximation of the
    published gate, which reads what each adapter makes of the whole block and so is bound to one
    length of the sequence (see `LearnedTemperatureRouter`). q is a mean over the sequences of a
    batch at each layer; published, a mean over the layers. All adapters are used; masking some of
    them at inference isn't offered.

    Args:
        balance: the loss's weight; 0.5 is published, 0 is none.
        temperature: where tau starts.
        router_scope: which modules share a gate: "layer", "block" (those of equal input) or "site"
            (each has its own).
        pool: see `SequenceRouter`.
    """

    needs_training = True

    def __init__(
        self,
        *,
        balance: float = 0.5,
        temperature: float = 1.0,
        router_scope: str = "layer",
        pool: str = "prompt",
    ) -> None:
        check_not_negative("balance", balance)
        self.balance = balance
        self.options = {"temperature": temperature, "pool": pool}
        self.router_scope = router_scope

    def settings(self, adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
        coefficient = self.balance * len(adapters)
        return {
            "router": "learned_temperature",
            "router_options": self.options,
            "router_scope": self.router_scope,
            "gate": "dense",
            "losses": {"gate_balance": coefficient} if coefficient else {},
        }
