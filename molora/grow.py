"""Room for another task: the experts of an adapter are frozen, and new ones are put beside them."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .checkpoint import WEIGHTS_NAME
from .config import MoloraConfig
from .routers import ROUTERS

FACTORS = (".molora_experts.A", ".molora_experts.B")


def grow(adapter: str | Path, grown: str | Path, num_experts: int = 1) -> MoloraConfig:
    """Write an adapter with more experts, whose old ones no longer train.

        trainer.save_model("task-1")
        molora.grow("task-1", "task-2")
        model = PeftModel.from_pretrained(base, "task-2", is_trainable=True)

    For methods whose experts activate themselves (MoRA, arXiv 2506.21035): a router with parameters
    of its own would have to learn the old tasks' decisions again. A new expert's A starts as LoRA's
    does and its B at zero, so it adds nothing yet; but its activation takes part in the choice of
    experts from the start, so tokens may get less of the old ones than before. Experts that were
    frozen before stay so.

    Args:
        adapter: folder of a saved adapter.
        grown: folder to write to, another one.
        num_experts: how many are added at every site, of the rank that the adapter's have.

    Returns:
        The configuration of the grown adapter.

    Raises:
        ValueError: the router has parameters, the sites have unlike experts, or the experts aren't
            plain LoRA factors.
    """
    config = MoloraConfig.from_pretrained(str(adapter))
    weights = load_file(Path(adapter) / WEIGHTS_NAME)
    _check(config, weights, num_experts)
    if Path(grown).resolve() == Path(adapter).resolve():
        raise ValueError(f"grown={str(grown)!r} is the adapter itself; name another folder.")
    assert isinstance(config.num_experts, int) and isinstance(config.r, int), "checked"
    frozen = config.num_experts * config.r
    new = replace(
        config,
        num_experts=config.num_experts + num_experts,
        experts="frozen_lora",
        expert_options={**config.expert_options, "frozen": frozen},
    )
    state: dict[str, Tensor] = {}
    for key in (key for key in weights if key.endswith(FACTORS[0])):
        site = key.removesuffix(FACTORS[0])
        state |= _grow_site(site, weights, num_experts * config.r)
    others = {key: value for key, value in weights.items() if ".molora_experts." not in key}
    new.save_pretrained(str(grown))
    save_file(state | others, Path(grown) / WEIGHTS_NAME, metadata={"format": "pt"})
    return new


def _check(config: MoloraConfig, weights: dict[str, Tensor], num_experts: int) -> None:
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts!r} to add must be at least 1.")
    if config.mixing != "linear":
        raise ValueError(f"mixing={config.mixing!r} can't be grown; that needs mixing='linear'.")
    router = ROUTERS.build(config.router, config.router_options, in_features=1, num_experts=2)
    stateful = any(".molora_router." in key or ".molora_gate." in key for key in weights)
    if stateful or any(True for _ in router.parameters()):
        raise ValueError(
            f"router={config.router!r} and gate={config.gate!r} have parameters or a state for "
            "each expert, which more experts don't fit; only experts that activate themselves can "
            "be added to (router='activation')."
        )
    if config.experts not in ("lora", "frozen_lora") or config.num_shared_experts:
        raise ValueError(
            f"experts={config.experts!r} with num_shared_experts={config.num_shared_experts!r} "
            "can't be grown; that needs experts='lora' and no shared ones."
        )
    if config.experts == "frozen_lora" and config.expert_options.get("frozen") is None:
        raise ValueError("all experts are frozen (frozen=None), so none are told apart as old.")
    uneven = not isinstance(config.num_experts, int) or not isinstance(config.r, int)
    if uneven or config.rank_pattern:
        raise ValueError(
            f"num_experts={config.num_experts!r}, r={config.r!r} and rank_pattern="
            f"{config.rank_pattern!r}: all sites must freeze equally many ranks, so the first two "
            "must be numbers and the last one empty."
        )


def _grow_site(site: str, weights: dict[str, Tensor], new_ranks: int) -> dict[str, Tensor]:
    """The site's tensors: what it had, frozen, and new factors of that many ranks."""
    old = []
    for name, dim in zip(FACTORS, (0, 1), strict=True):
        before = weights.get(site + name.replace("experts.", "experts.frozen_"))
        trained = weights[site + name]
        old.append(trained if before is None else torch.cat([before, trained], dim))
    A, B = old
    down = torch.empty(new_ranks, A.shape[1], dtype=torch.float32)
    torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return {
        site + ".molora_experts.frozen_A": A,
        site + ".molora_experts.frozen_B": B,
        site + FACTORS[0]: down.to(A.dtype),
        site + FACTORS[1]: B.new_zeros(B.shape[0], new_ranks),
    }
