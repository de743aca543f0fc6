"""The configurations that every invariant of the tuner is tested with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from molora import MoloraConfig

GATES: dict[str, dict[str, Any]] = {
    "dense": {},
    "top_k": {"top_k": 2},
    "top_k_unnormalized": {"top_k": 1},
    "switch": {},
    "sigmoid": {"top_k": 3},
    "top_p": {"gate_options": {"p": 0.6}},
    "threshold": {},
}
SCOPES = ("site", "block", "layer")
# The linear modules of a Llama layer, in the order in which they run.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """One configuration, on a two-layer Llama, with the ranks that it must lead to.

    Attributes:
        name: the test's id.
        fields: of `MoloraConfig`.
        ranks: of the experts in each of the two layers, shared ones not counted.
        shared: ranks of the shared experts.
        scaling: of an expert, by its rank.
    """

    name: str
    fields: dict[str, Any]
    ranks: tuple[tuple[int, ...], tuple[int, ...]] = ((2,) * 4, (2,) * 4)
    shared: tuple[int, ...] = ()
    scaling: Callable[[int], float] = lambda rank: 6 / rank

    @property
    def gate(self) -> str:
        return self.fields.get("gate", "top_k")

    @property
    def is_routed(self) -> bool:
        """Whether any layer has experts to choose from."""
        return any(len(ranks) > 1 for ranks in self.ranks)

    @property
    def losses(self) -> dict[str, float]:
        """Losses that this configuration allows, large enough to be seen in a gradient."""
        if not self.is_routed:
            return {}
        return {"z_loss": 0.1} if self.gate == "dense" else {"load_balancing": 0.5, "z_loss": 0.1}

    def config(self, **overrides: Any) -> MoloraConfig:
        defaults = {
            "r": 2,
            "lora_alpha": 6,
            "num_experts": 4,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        }
        return MoloraConfig(**{**defaults, **self.fields, **overrides})

    def decides(self, module: str) -> str:
        """The module of the same layer that decides for this one."""
        targets = self.fields.get("target_modules", MODULES)
        scope = self.fields.get("router_scope", "site")
        if scope == "layer":
            return targets[0]
        block = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        return block.get(module, module) if scope == "block" else module


def _cases() -> list[Case]:
    unequal = (1, 4, 2, 3)
    return [
        *(
            Case(f"{gate}-{scope}", {"gate": gate, "router_scope": scope, **fields})
            for gate, fields in GATES.items()
            for scope in SCOPES
        ),
        Case("unequal-ranks", {"r": [list(unequal)] * 2}, (unequal, unequal)),
        Case(
            "rank-wise",
            {"rank_wise": True, "num_experts": 3, "top_k": 4},
            ((1,) * 6, (1,) * 6),
            scaling=lambda rank: 3.0,
        ),
        Case(
            "shared-experts",
            {"num_shared_experts": 2, "shared_expert_rank": 3, "router_scope": "block"},
            shared=(3, 3),
        ),
        Case(
            "per-layer",
            {"num_experts": "inverted_triangle:2-6", "r": [4, 2], "top_k": [2, 3]},
            ((4,) * 2, (2,) * 6),
        ),
        Case("some-layers-unrouted", {"num_experts": [1, 4]}, ((2,), (2,) * 4)),
        Case("one-expert", {"num_experts": 1}, ((2,), (2,))),
        Case("plain-lora", {"num_experts": 0, "num_shared_experts": 1}, ((), ()), (2,)),
        Case(
            "rslora-biased-router",
            {"use_rslora": True, "router_options": {"bias": True, "temperature": 0.7}},
            scaling=lambda rank: 6 / rank**0.5,
        ),
        Case("constant-scaling", {"scaling_rule": "constant"}, scaling=lambda rank: 6.0),
        Case("attention-only", {"target_modules": list(MODULES[:4]), "router_scope": "layer"}),
        Case("feed-forward-only", {"target_modules": list(MODULES[4:]), "router_scope": "block"}),
    ]


CASES = _cases()
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_routed_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.is_routed], ids=lambda case: case.name
)
