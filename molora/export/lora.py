"""Plain PEFT LoRA adapters from a mixture: the whole of it, where it is static, or each expert.

With weights w held fixed, B diag(w) A is one LoRA of the experts' ranks together: A is stacked as
it is, and the weights and scalings go into B.
"""

from pathlib import Path

import torch
from torch import nn

from ..config_checks import check_count
from .card import write_card
from .folder import new_folder
from .peft_folder import Factors, Source, source_of, truncated, write_lora

HOW_TO_EXPORT = (
    "the adapter {name!r} routes its experts by token, and a LoRA adapter can't. Put a static map "
    "in the routing's place, measured (molora.calibrate) or given (molora.fix_routing); write the "
    "experts and the router for an engine that routes (molora.export_bundle); or each expert by "
    "itself (molora.export_experts)."
)


def export_lora(
    model: nn.Module,
    out_dir: str | Path,
    rank: int | None = None,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a static mixture as one PEFT LoRA adapter, which needs no molora to be loaded.

    Static is what routes nothing, what routes all tokens alike, and what `calibrate` or
    `fix_routing` put in the routing's place.

    Args:
        model: a model with a MoLoRA adapter.
        out_dir: folder to be made; it appears when everything in it is written.
        rank: cut each site to this rank by singular values; None is exact: the ranks of the experts
            with a weight together (see `calibrate(method="low_rank")` for a cut that knows data).
        adapter_name: which adapter.
        dtype: of the file; None for the experts' own.
        overwrite: replace a folder that isn't empty.

    Returns:
        The folder.

    Raises:
        ValueError: something is routed by token, or the adapter has trained more than experts.
        FileExistsError: the folder isn't empty.
    """
    if rank is not None:
        check_count(1)("rank", rank)
    source = source_of(model, adapter_name)
    factors, notes = static_factors(source)
    if rank is not None:
        cuts = {site: truncated(A, B, rank) for site, (A, B) in factors.items()}
        factors = {site: cut for site, (cut, _) in cuts.items()}
        error = max(error for _, error in cuts.values())
        notes.append(
            f"Cut to rank {rank} by singular values; the largest relative error of a weight change "
            f"(Frobenius norm) is {error:.3g}."
        )
    with new_folder(out_dir, overwrite) as folder:
        write_card(folder, "Static mixture as one LoRA adapter", source, notes)
        write_lora(folder, factors, source, dtype)
    return Path(out_dir)


def export_experts(
    model: nn.Module,
    out_dir: str | Path,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write each expert as a PEFT LoRA adapter of its own: `out_dir`/e0, e1, ..., shared0, ...

    A folder holds the sites that have that expert. What the routed experts add to a token is the
    sum of them by the routing weights; the shared ones always count.

    Args and errors: see `export_lora`; the experts may be routed.
    """
    source = source_of(model, adapter_name)
    with new_folder(out_dir, overwrite) as folder:
        names = write_experts(folder, source, dtype)
        write_card(folder, "Experts", source, [f"One LoRA adapter each: {', '.join(names)}."])
    return Path(out_dir)


def write_experts(folder: Path, source: Source, dtype: torch.dtype | None = None) -> list[str]:
    """The names of the sub-folders that it wrote, the routed experts first."""
    found: dict[str, dict[str, Factors]] = {}
    for site, layer in source.layers.items():
        own = layer.experts_of(source.adapter_name).lora_factors()
        blocks = zip(own.A.split(own.ranks, 0), own.B.split(own.ranks, 1), strict=True)
        for number, block in enumerate(blocks):
            if own.ranks[number] == 0:  # the site has no part of that expert
                continue
            always = number - own.num_routed
            name = f"e{number}" if always < 0 else f"shared{always}"
            found.setdefault(name, {})[site] = block
    names = sorted(found, key=lambda name: (name[0], len(name), name))
    for name in names:
        (folder / name).mkdir()
        count = f"It is part of {len(found[name])} of {len(source.layers)} adapted modules."
        write_card(folder / name, f"Expert {name} of a mixture", source, [count])
        write_lora(folder / name, found[name], source, dtype)
    return names


def static_factors(source: Source) -> tuple[dict[str, Factors], list[str]]:
    """Site -> factors of the map that stands for the experts, and what there is to say about it.

    Raises:
        ValueError: a site is routed by token and nothing stands for that.
    """
    factors, inexact = {}, {}
    for site, layer in source.layers.items():
        mixture = layer.static_mixture(source.adapter_name)
        if mixture is None:
            raise ValueError(HOW_TO_EXPORT.format(name=source.adapter_name))
        experts = layer.experts_of(source.adapter_name)
        factors[site] = mixture.low_rank(experts)
        inexact[mixture.source] = not mixture.exact
    notes = []
    for text, approximates in inexact.items():
        start = "An approximation of token routing" if approximates else "Exact"
        notes.append(f"{start}: {text}.")
    return factors, notes
