"""Saved LoRA adapters, as factors that a mixture can hold."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..checkpoint import check_finite
from ..quantized import keep_4bit_layout

FACTOR = re.compile(r"base_model\.model\.(?P<site>.+)\.lora_(?P<factor>[AB])\.weight")
# What the sum of scaled B A x doesn't say, and the value that means it isn't used.
UNUSED = {
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}
# Initialisations that leave the base model's weights as they were.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraAdapter:
    """One LoRA adapter.

    Attributes:
        source: where it was read from.
        task_type: of its model, such as "CAUSAL_LM".
        factors: site -> A (r, d_in) and B (d_out, r), the scaling inside B; both fp32 (fp64 where
            they were saved so).
    """

    source: str
    task_type: str | None
    factors: dict[str, tuple[Tensor, Tensor]]


def read_loras(
    base_model: nn.Module, adapters: Sequence[str | Path]
) -> tuple[list[LoraAdapter], list[str]]:
    """The adapters, and the modules that any of them targets, in the order of the model.

    Raises:
        ValueError: there is none, one can't be composed, or it is of another base model.
    """
    if isinstance(adapters, str | Path):
        raise ValueError(f"adapters={str(adapters)!r} must be a list of folders or Hub names.")
    if not adapters:
        raise ValueError("adapters is empty: name at least one.")
    if any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise ValueError(
            "the base model holds an adapter already; load it anew, or take what unload() or "
            "merge_and_unload() gives."
        )
    keep_4bit_layout(base_model)  # before the first pass of what is fitted to data
    loras = [read_lora(adapter) for adapter in adapters]
    return loras, _sites(base_model, loras)


def read_lora(source: str | Path) -> LoraAdapter:
    """Read an adapter from a folder or the Hub.

    Raises:
        ValueError: it isn't a LoRA adapter, or holds more than the factors of linear modules, or
            numbers that aren't finite.
    """
    config = PeftConfig.from_pretrained(str(source))
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"{str(source)!r} is an adapter of type {config.peft_type.value}; only LoRA adapters "
            "can be composed."
        )
    _check(str(source), config)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_peft_weights(str(source), device="cpu").items():
        found = FACTOR.fullmatch(key)
        if found is None or tensor.dim() != 2:
            raise ValueError(
                f"{str(source)!r} holds {key} {tuple(tensor.shape)}, which is no LoRA factor of a "
                "linear module; it can't be composed without changing what it computes."
            )
        wide = tensor if tensor.dtype.itemsize == 8 else tensor.float()
        check_finite(str(source), {key: wide})
        pairs.setdefault(found["site"], {})[found["factor"]] = wide
    factors = {}
    for site, pair in pairs.items():
        if len(pair) < 2:
            raise ValueError(f"{str(source)!r} holds only one factor of {site!r}.")
        factors[site] = pair["A"], pair["B"] * _scaling(config, site, len(pair["A"]))
    task_type = config.task_type
    return LoraAdapter(str(source), None if task_type is None else str(task_type), factors)


def _check(source: str, config: LoraConfig) -> None:
    for field, unused in UNUSED.items():
        value = getattr(config, field, unused)
        if value != unused and value:
            raise ValueError(
                f"{source!r} has {field}={value!r}, which a sum of LoRA experts doesn't express; "
                "it can't be composed."
            )
    start = config.init_lora_weights
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{source!r} has init_lora_weights={start!r}, which changed its base model's weights; "
            "convert it first (save_pretrained with path_initial_model_for_weight_conversion)."
        )


def _scaling(config: LoraConfig, site: str, rank: int) -> float:
    key = get_pattern_key(list(config.alpha_pattern or {}), site)
    alpha = (config.alpha_pattern or {}).get(key, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _sites(base_model: nn.Module, loras: Iterable[LoraAdapter]) -> list[str]:
    modules = dict(base_model.named_modules())
    wanted = set()
    for lora in loras:
        for site, (A, B) in lora.factors.items():
            module = modules.get(site)
            sizes = (None, None) if module is None else _get_in_out_features(module)
            if sizes != (A.shape[1], B.shape[0]):
                has = "has no such module" if module is None else f"has {sizes[0]} and {sizes[1]}"
                raise ValueError(
                    f"{lora.source!r} was trained on another base model: it adapts {site!r} with "
                    f"{A.shape[1]} inputs and {B.shape[0]} outputs, and this model {has}."
                )
            wanted.add(site)
    return [name for name in modules if name in wanted]
