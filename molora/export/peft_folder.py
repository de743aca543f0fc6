"""Writing one plain PEFT LoRA adapter: what PEFT, vLLM, SGLang, LoRAX and llama.cpp's converter
read.

What the engines ask for, beyond what PEFT does: no tensor but lora_A and lora_B in the weights, no
`modules_to_save`, and (SGLang) the rank of the configuration at every module. So every scaling is
inside B (`lora_alpha` = r), and sites of lower rank are filled up with zeros, which is exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import MoloraConfig
from ..layer import MoloraLayer, adapted_layers

WEIGHTS_NAME = "adapter_model.safetensors"
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """The adapter that an export is made from.

    Attributes:
        model: the model that carries it.
        adapter_name: its name.
        config: its configuration.
        layers: its sites.
    """

    model: nn.Module
    adapter_name: str
    config: MoloraConfig
    layers: dict[str, MoloraLayer]

    @property
    def dtype(self) -> torch.dtype:
        """That of the experts' parameters."""
        layer = next(iter(self.layers.values()))
        return next(layer.molora_experts[self.adapter_name].parameters()).dtype


def source_of(model: nn.Module, adapter_name: str) -> Source:
    """The adapter, if all that it has trained can be written as LoRA.

    Raises:
        ValueError: there is no such adapter, or it has trained more than experts and routers.
    """
    layers = adapted_layers(model, adapter_name)
    config = cast(MoloraConfig, model.peft_config[adapter_name])  # type: ignore[index]
    others = {
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": None if config.bias == "none" else config.bias,
    }
    for field, value in others.items():
        if value:
            raise ValueError(
                f"the adapter {adapter_name!r} has {field}={value!r}, which no LoRA file holds for "
                "the serving engines. Merge it (merge_and_unload) and save the whole model."
            )
    return Source(model, adapter_name, config, layers)


def write_lora(
    folder: Path, factors: Mapping[str, Factors], source: Source, dtype: torch.dtype | None = None
) -> int:
    """Write weights, then the configuration, without which nothing loads them.

    Args:
        folder: an existing folder.
        factors: site -> A (q, d_in) and B (d_out, q).
        source: where they come from.
        dtype: of the file; None for the experts' own.

    Returns:
        The rank.
    """
    rank = max(1, *(A.shape[0] for A, _ in factors.values()))
    padded = {}
    for site, (A, B) in factors.items():
        missing = rank - A.shape[0]
        A = nn.functional.pad(A.detach(), (0, 0, 0, missing))
        padded[site] = A, nn.functional.pad(B.detach(), (0, missing))
    save_factors(folder, padded, dtype or source.dtype)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_modules(source.model, factors),
        fan_in_fan_out=any(
            isinstance(source.layers[site].get_base_layer(), Conv1D) for site in factors
        ),
        task_type=source.config.task_type,
        base_model_name_or_path=source.config.base_model_name_or_path,
        revision=source.config.revision,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    return rank


def check_dtype(dtype: object) -> None:
    """Raise `ValueError` unless it is a dtype whose numbers have fractions."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be one of floating point, such as torch.bfloat16.")


def save_factors(folder: Path, factors: Mapping[str, Factors], dtype: torch.dtype) -> None:
    """Write A (q, d_in) and B (d_out, q) of each site under PEFT's names.

    Raises:
        ValueError: the dtype has no fractions.
    """
    check_dtype(dtype)
    tensors = {
        f"base_model.model.{site}.lora_{name}.weight": factor.to("cpu", dtype).contiguous()
        for site, pair in factors.items()
        for name, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def target_modules(model: nn.Module, sites: Mapping[str, object]) -> list[str]:
    """The sites as PEFT names them: by their last parts where these mean no other module."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kinds = {site.rpartition(".")[2] for site in sites}
    named = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in kinds}
    return sorted(kinds) if named == set(sites) else sorted(sites)


def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Factors, float]:
    """The best factors of that rank for the product B A, by singular values, and their relative
    error in the Frobenius norm."""
    Q_A, R_A = torch.linalg.qr(A.detach().double().T)
    Q_B, R_B = torch.linalg.qr(B.detach().double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root = S[:rank].sqrt()
    error = float(S[rank:].norm() / S.norm()) if S.any() else 0.0
    return (root[:, None] * (Vh[:rank] @ Q_A.T), (Q_B @ U[:, :rank]) * root), error
