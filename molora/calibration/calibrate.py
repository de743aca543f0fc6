"""From a routed adapter to a static one: fit, measure, and hold the result for merge and export."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from ..config import MoloraConfig
from ..config_checks import check_count, check_not_negative
from ..gates import GATES
from ..layer import MoloraLayer, adapted_layers
from ..registry import unknown_name_message
from ..static_mixture import StaticMixture, fingerprint
from .divergence import compare_logits
from .fits import METHODS, SiteFit, fit_site
from .moments import Batch, SiteMoments, collect_moments
from .report import CalibrationReport, SiteReport

HELD_OUT_EVERY = 8


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    method: str = "least_squares",
    rank: int | None = None,
    *,
    ridge: float = 1e-3,
    held_out: Sequence[Batch] | None = None,
    adapter_name: str = "default",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Find the static map that comes nearest to each site's routed experts, and hold it.

    After it, `merge_and_unload`, `merge_adapter` and `export_lora` take the static maps, and
    `with molora.static_routing(model)` computes with them; the forward pass goes on routing.

    Args:
        model: a model of which this adapter, and no other, is active and not merged.
        batches: keyword arguments of the model's forward, read once.
        method: "mean": the mean routing weights. "least_squares": the best routing weights.
            "full": the best linear map. "low_rank": the best linear map of rank `rank`. The last
            two are of the adapter's whole contribution, shared experts included, and keep d_in^2
            numbers for each distinct input (see `collect_moments`).
        rank: rank of the map, for "low_rank" alone.
        ridge: pull of each method to the simpler one, relative to the mean eigenvalue of the data;
            the fewer tokens, the larger it should be.
        held_out: batches for the comparison of the logits; None keeps every eighth of `batches`,
            from the second on, for that. They are read three times.
        adapter_name: the adapter.
        device: where sums are kept; None for where each site computes.
        progress: show progress bars.

    Raises:
        ValueError: the method is unknown, `rank` doesn't go with it, nothing is routed by token,
            other adapters are at work, or the data holds no real token.
    """
    linear_maps = check_method(method, rank, ridge)
    layers = adapted_layers(model, adapter_name)
    _check_routed(model, layers, adapter_name, method)
    kept: list[Batch] = []
    fitted = _Remaining(batches, kept) if held_out is None else batches
    moments = collect_moments(model, fitted, adapter_name, linear_maps, device, progress)
    compared = kept if held_out is None else held_out
    return fit(model, moments, method, rank, ridge, compared, adapter_name, progress)


def fit(
    model: nn.Module,
    moments: Mapping[str, SiteMoments],
    method: str,
    rank: int | None = None,
    ridge: float = 1e-3,
    held_out: Iterable[Batch] = (),
    adapter_name: str = "default",
    progress: bool = True,
) -> CalibrationReport:
    """The second half of `calibrate`, for several methods on one pass over the data.

    Args:
        model: see `calibrate`, as the other arguments.
        moments: what `collect_moments` gave.
    """
    (report,) = fit_each(model, moments, {method: rank}, ridge, held_out, adapter_name, progress)
    return report


def fit_each(
    model: nn.Module,
    moments: Mapping[str, SiteMoments],
    methods: Mapping[str, int | None],
    ridge: float = 1e-3,
    held_out: Iterable[Batch] = (),
    adapter_name: str = "default",
    progress: bool = True,
) -> list[CalibrationReport]:
    """`fit` for several methods, with one routed pass over `held_out` for all of them.

    The model holds the last one's result afterwards.

    Args:
        model: see `calibrate`, as the other arguments.
        moments: what `collect_moments` gave.
        methods: method -> rank, None for all but "low_rank".
    """
    for method, rank in methods.items():
        check_method(method, rank, ridge)
    layers = adapted_layers(model, adapter_name)
    fits = [
        {
            site: found
            for site, found in _fits(moments, method, ridge, rank)
            if found.factors is not None or layers[site].is_routed(adapter_name)
        }
        for method, rank in methods.items()
    ]
    stand_ins = [
        {
            site: StaticMixture(
                exact=False,
                source=f"calibrated by {method}",
                weights=found.weights,
                factors=found.factors,
                fingerprint=fingerprint(moments[site].factors),
            )
            for site, found in of_method.items()
        }
        for method, of_method in zip(methods, fits, strict=True)
    ]
    compared = compare_logits(model, held_out, stand_ins, adapter_name, progress)
    tokens = max(site.tokens for site in moments.values())
    reports = []
    for (method, rank), found, mixtures, divergence in zip(
        methods.items(), fits, stand_ins, compared, strict=True
    ):
        sites = tuple(
            _site_report(layers[site], adapter_name, site, found[site], mixture)
            for site, mixture in mixtures.items()
        )
        report = CalibrationReport(method, adapter_name, rank, ridge, tokens, sites, divergence)
        reports.append(report)
    for site, mixture in stand_ins[-1].items():
        final = replace(mixture, source=reports[-1].summary())
        layers[site].set_static_mixture(adapter_name, final)
    return reports


def check_method(method: str, rank: int | None, ridge: float) -> bool:
    """Whether the method fits a linear map.

    Raises:
        ValueError: see `calibrate`.
    """
    if method not in METHODS:
        raise ValueError(unknown_name_message("method", method, METHODS))
    if (method == "low_rank") != (rank is not None):
        raise ValueError(
            f"rank={rank} with method={method!r}: 'low_rank' alone takes, and needs it."
        )
    if rank is not None:
        check_count(1)("rank", rank)
    check_not_negative("ridge", ridge)
    return method in ("full", "low_rank")


def _check_routed(
    model: nn.Module, layers: Mapping[str, MoloraLayer], adapter_name: str, method: str
) -> None:
    config = cast(MoloraConfig, model.peft_config[adapter_name])  # type: ignore[index]
    routed = any(layer.is_routed(adapter_name) for layer in layers.values())
    if method != "low_rank" and (not routed or GATES.get(config.gate).constant):
        raise ValueError(
            f"the adapter {adapter_name!r} routes nothing by token; it merges exactly as it is. "
            "Only 'low_rank' has something to fit."
        )


class _Remaining:
    """The batches without every eighth, which goes to `kept`."""

    def __init__(self, batches: Iterable[Batch], kept: list[Batch]) -> None:
        self._batches = batches
        self._kept = kept

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self._batches):
            if number % HELD_OUT_EVERY == 1:
                self._kept.append(batch)
            else:
                yield batch


def _fits(
    moments: Mapping[str, SiteMoments], method: str, ridge: float, rank: int | None
) -> Iterator[tuple[str, SiteFit]]:
    """Each site that saw a token. What was made of an input goes when its sites are through."""
    previous = None
    for site, sums in moments.items():
        if sums.tokens == 0:
            continue
        if previous is not None and previous is not sums.source:
            previous.forget()
        previous = sums.source
        yield site, fit_site(sums, method, ridge, rank)
    if previous is not None:
        previous.forget()


def _site_report(
    layer: MoloraLayer, adapter_name: str, site: str, found: SiteFit, mixture: StaticMixture
) -> SiteReport:
    A, _ = mixture.low_rank(layer.experts_of(adapter_name))
    weights = None if found.weights is None else tuple(found.weights.tolist())
    return SiteReport(site, found.relative_error, len(A), weights)
