"""LoRA-Mixer (arXiv 2507.00029): a router trained softly over all, few experts at inference."""

from collections.abc import Sequence
from typing import Any

from ..config_checks import check_count
from .base import Composer, register_composer, trained_or_frozen
from .sources import LoraAdapter

ENTROPY_WEIGHT = 0.1


@register_composer("lora-mixer")
class LoraMixer(Composer):
    """p = softmax(W_r x / temperature); w = p in training, the `top_k` largest of it, renormalised,
    at inference. It starts at random: train it before use, on about 2000 examples of all tasks.

    Training adds c (E * sum of f_e P_e + entropy_weight * mean H(p) / log E), the loss
    "specialization_balance", whose docstring says why the entropy's sign is an option: as printed
    (a negative `entropy_weight`) it would make every token's weights equal.

    The paper's first stage, hard routing by the task's label, is what trained each adapter by
    itself. Left out: its penalty on what adapters change in joint training (`train_experts`).
    Unverified, since there is no code: that the three are renormalised, that each module has its
    own router, and all coefficients; those here are this library's choice.

    Args:
        top_k: experts of a token at inference.
        temperature: see above.
        coefficient: c; 0 for none.
        entropy_weight: see above.
        train_experts: whether the adapters train on, too.
    """

    needs_training = True

    def __init__(
        self,
        *,
        top_k: int = 3,
        temperature: float = 1.0,
        coefficient: float = 1e-2,
        entropy_weight: float = ENTROPY_WEIGHT,
        train_experts: bool = False,
    ) -> None:
        check_count(1)("top_k", top_k)
        if not coefficient and entropy_weight != ENTROPY_WEIGHT:
            raise ValueError(
                f"entropy_weight={entropy_weight!r} has no effect with coefficient=0, which leaves "
                "the whole loss out; leave entropy_weight out, or set a coefficient."
            )
        self.top_k = top_k
        self.temperature = temperature
        self.loss = {"coefficient": coefficient, "entropy_weight": entropy_weight}
        self.train_experts = train_experts

    def settings(self, adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
        return {
            "router": "linear",
            "router_options": {"temperature": self.temperature},
            "gate": "dense_training",
            "gate_options": {"renormalize": True},
            "top_k": min(self.top_k, len(adapters)),
            "losses": {"specialization_balance": self.loss} if self.loss["coefficient"] else {},
            **trained_or_frozen(self.train_experts),
        }
