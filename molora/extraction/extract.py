"""A LoRA adapter from a full fine-tune: the best low-rank part of what it changed (FlexMoRE).

At each module D = W_tuned - W_base = U S V^T, and A = sqrt(S_r) V_r^T, B = U_r sqrt(S_r) hold its r
largest singular values: no other factors of that rank are nearer to D in the Frobenius norm.
Nothing is trained.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..architecture import empty_model
from ..checkpoint import check_finite
from ..config_checks import check_count
from ..export.card import write_page
from ..export.folder import new_folder
from ..export.peft_folder import Factors, check_dtype, save_factors, target_modules
from ..settings import check_setting, matches, resolve_setting
from ..value_types import is_number
from .decomposition import relative_error, truncate
from .report import Extraction, listed
from .weights import Weights, opened

Model = str | Path | nn.Module
Targets = Sequence[str] | str


def extract_lora(
    base: Model,
    tuned: Model,
    output: str | Path,
    rank: int | dict[str, int] | None = None,
    *,
    max_error: float | None = None,
    targets: Targets = "all-linear",
    allow_loss: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> Extraction:
    """Write what a full fine-tune changed as a plain PEFT LoRA adapter.

        report = molora.extract_lora("base", "tuned", "expert", rank=64)
        molora.compose(base_model, ["expert", "another"])

    Models given by name are read from their safetensors files one tensor at a time. Equal ranks
    are the adapter's `r`; others go into `rank_pattern`.

    Args:
        base: the model before, by folder or Hub name, or loaded.
        tuned: the model after.
        output: folder to be made; it appears when everything in it is written.
        rank: of every module, or by regex ({"mlp.*": 64, ".*": 16}); cut where a module is smaller.
        max_error: use the lowest rank whose relative error (Frobenius) is at most this; an error e
            keeps 1 - e^2 of the energy. With `rank` too, that is the most.
        targets: as PEFT's target_modules; "all-linear" is every linear module but the output head.
        allow_loss: leave out what differs and isn't in a targeted weight (norms, embeddings,
            biases), with a warning, instead of raising.
        dtype: of the file.
        device: where to decompose. 2048 x 5632 takes 33 s on one core of an EPYC; it is cubic.
        overwrite: replace a folder that isn't empty.

    Returns:
        The error and the rank of each module.

    Raises:
        ValueError: the models don't fit together, nothing targeted differs, something else does, or
            an option is wrong.
        FileExistsError: the folder isn't empty.
    """
    check_dtype(dtype)
    plan = plan_extraction(base, rank, max_error=max_error, targets=targets)
    with opened(base) as before, opened(tuned) as after, new_folder(output, overwrite) as folder:
        lost = _lost(plan, before, after, allow_loss)
        report = Extraction(Path(output), lost=lost, max_error=max_error)
        factors = _decompose(plan, before, after, report, dtype, torch.device(device))
        save_factors(folder, factors, dtype)
        config = _config(plan, report)
        origin = f"the fine-tune `{after.source}`"
        write_page(folder, "A fine-tune as a LoRA adapter", config, origin, report.card())
        config.save_pretrained(str(folder))
    for said in report.shortcomings():
        warnings.warn(f"molora: {said}", stacklevel=2)
    return report


@dataclass(frozen=True)
class ExtractionPlan:
    """What would be decomposed.

    Attributes:
        model: the base model; its weights may be on the meta device.
        most: the highest rank of each targeted module.
        max_error: see `extract_lora`.
    """

    model: nn.Module
    most: dict[str, int]
    max_error: float | None

    def describe(self, dtype: torch.dtype) -> str:
        """How many modules, and how large the adapter gets at most."""
        weights = {site: self.model.get_parameter(f"{site}.weight") for site in self.most}
        numbers = sum(self.most[site] * sum(weight.shape) for site, weight in weights.items())
        size = numbers * dtype.itemsize
        ranks = sorted(set(self.most.values()))
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"{len(self.most)} modules, ranks {shown} at most, {size / 2**20:,.1f} MiB at most"


def plan_extraction(
    base: Model,
    rank: int | dict[str, int] | None = None,
    *,
    max_error: float | None = None,
    targets: Targets = "all-linear",
) -> ExtractionPlan:
    """Find the targeted modules and their ranks; arguments and errors are `extract_lora`'s."""
    if rank is None and max_error is None:
        raise ValueError("give rank, max_error, or both.")
    if rank is not None:
        if not isinstance(rank, int | dict):
            raise ValueError(f"rank={rank!r} must be a number or a regex map.")
        check_setting("rank", rank, check_count(1))
    if max_error is not None and (not is_number(max_error) or not 0 < max_error < 1):
        raise ValueError(f"max_error={max_error!r} must be between 0 and 1.")
    model = base if isinstance(base, nn.Module) else empty_model(str(base))
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    _maybe_include_all_linear_layers(config, model)
    most = {}
    for site, module in model.named_modules():
        if not site or not check_target_module_exists(config, site):
            continue
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(
                f"targets={targets!r} names {site!r}, a {type(module).__name__}; only linear "
                "modules can be decomposed."
            )
        widest = min(module.weight.shape)
        most[site] = widest if rank is None else min(widest, _rank_of(rank, site))
    if not most:
        raise ValueError(f"targets={targets!r} name no module of the base model.")
    _check_names(most, targets, rank)
    return ExtractionPlan(model, most, max_error)


def _check_names(
    sites: Collection[str], targets: Targets, rank: int | dict[str, int] | None
) -> None:
    """Raise `ValueError` for targets and regexes of ranks that no module answers to."""
    if not isinstance(targets, str):
        idle = [t for t in targets if not any(f".{site}".endswith(f".{t}") for site in sites)]
        if idle:
            raise ValueError(f"targets {listed(idle)} name no module of the base model.")
    if isinstance(rank, dict):
        idle = [p for p in rank if p != ".*" and not any(matches(p, site) for site in sites)]
        if idle:
            raise ValueError(f"rank has {listed(idle)}, which match no targeted module.")


def _rank_of(rank: int | dict[str, int], site: str) -> int:
    return int(resolve_setting("rank", rank, site, None, 0))


def _lost(plan: ExtractionPlan, before: Weights, after: Weights, allowed: bool) -> dict[str, float]:
    """Tensors that differ and aren't targeted, with |D| / |base|.

    Raises:
        ValueError: there are some and none is allowed, or the models have unlike tensors.
    """
    targeted = {f"{site}.weight" for site in plan.most}
    tied = _tied(plan.model)
    names = [name for name in before.names() if name not in tied]
    others = {name for name in after.names() if name not in tied}
    unlike = sorted(others.symmetric_difference(names))
    if unlike:
        raise ValueError(
            f"{before.source} and {after.source} aren't of one architecture: {listed(unlike)} are "
            "in one of them only."
        )
    lost = {}
    for name in tqdm(names, "Comparing", disable=None):
        if name in targeted:
            continue
        old, new = _pair(name, before, after)
        if not torch.equal(old, new):
            size = old.norm()
            lost[name] = float((new - old).norm() / size) if size > 0 else float("inf")
    if lost and not allowed:
        raise ValueError(
            f"{after.source} also changed {listed(lost)}, which no LoRA on the targeted modules "
            "holds. Add linear modules to the targets, or leave the changes out with "
            "allow_loss=True."
        )
    return lost


def _tied(model: nn.Module) -> set[str]:
    """Names of tensors that are others' under another name."""
    config: Any = getattr(model, "config", None)
    tied: Any = getattr(model, "_tied_weights_keys", None)
    return set(tied or ()) if getattr(config, "tie_word_embeddings", False) else set()


def _decompose(
    plan: ExtractionPlan,
    before: Weights,
    after: Weights,
    report: Extraction,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Factors]:
    """The factors of each module that differs; ranks and errors go into the report.

    Raises:
        ValueError: none differs, or one isn't finite.
    """
    factors = {}
    for site in tqdm(plan.most, "Decomposing", disable=None):
        weight = f"{site}.weight"
        old, new = _pair(weight, before, after)
        check_finite(before.source, {weight: old})
        check_finite(after.source, {weight: new})
        D = (new - old).to(device)
        if isinstance(plan.model.get_submodule(site), Conv1D):
            D = D.mT
        if not D.any():
            report.unchanged.append(site)
            continue
        pair = truncate(D, plan.most[site], plan.max_error)
        A, B = (factor.to(dtype) for factor in pair)
        factors[site] = A.cpu(), B.cpu()
        report.ranks[site] = len(A)
        report.errors[site] = relative_error(D, A, B)
    if not factors:
        raise ValueError(f"{after.source} equals {before.source} in all targeted modules.")
    return factors


def _pair(name: str, before: Weights, after: Weights) -> tuple[Tensor, Tensor]:
    """A tensor of both models, in fp32 or, where one has that, fp64."""
    old, new = before.read(name), after.read(name)
    if old.shape != new.shape:
        raise ValueError(
            f"{name} is {tuple(old.shape)} in the base model and {tuple(new.shape)} in the "
            "fine-tune; a LoRA can't resize it."
        )
    if not old.is_floating_point() or not new.is_floating_point():
        raise ValueError(
            f"{name} is stored as {old.dtype} and {new.dtype}; give models that aren't quantised."
        )
    wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
    return old.to(wide), new.to(wide)


def _config(plan: ExtractionPlan, report: Extraction) -> LoraConfig:
    """PEFT's configuration, with alpha = r everywhere: the factors are scaled already."""
    most = max(report.ranks.values())
    others = {site: rank for site, rank in report.ranks.items() if rank != most}
    modules = [plan.model.get_submodule(site) for site in report.ranks]
    config: Any = getattr(plan.model, "config", None)
    return LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=target_modules(plan.model, report.ranks),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules),
        task_type="CAUSAL_LM" if "CausalLM" in type(plan.model).__name__ else None,
        base_model_name_or_path=getattr(config, "_name_or_path", None) or None,
        inference_mode=True,
    )
