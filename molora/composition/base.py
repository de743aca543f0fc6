"""What a way to compose is."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..config_checks import check_count
from ..registry import Registry
from ..routers import Router
from ..sites import Site
from .fitting import Batches
from .sources import LoraAdapter

COMPOSERS: Registry[type["Composer"]] = Registry("router to compose by")
register_composer = COMPOSERS.register

NOTHING: Mapping[str, Any] = MappingProxyType({})
Gates = Sequence[Mapping[str, Tensor]]


class Composer:
    """One way to weigh composed adapters: the settings that it makes, and what it knows of them.

    A subclass's keyword-only constructor parameters are what `molora.compose` takes for it beside
    the adapters.

    Attributes:
        needs_training: the router starts at random; until it is trained a mixture of several is of
            no use.
        by_module: what it knows is about single modules, so it decides for no whole network.
        data: what `fit` fits to: "examples" of the task, or examples of "each" adapter's own; None
            where nothing is fitted.
        fitted: the option that `fit` gives.
    """

    needs_training = False
    by_module = False
    data: str | None = None
    fitted: str | None = None

    @property
    def name(self) -> str:
        """As in `molora.compose(router=...)`."""
        return COMPOSERS.name_of(type(self))

    @classmethod
    def fit(
        cls,
        base_model: nn.Module,
        adapters: Sequence[str],
        batches: Sequence[Batches],
        chosen: Mapping[str, Any] = NOTHING,
    ) -> dict[str, Any]:
        """The option `fitted` by its name, from data.

        Args:
            base_model: see `molora.compose`.
            adapters: see `molora.compose`.
            batches: one stream, or one for each adapter, as `data` says.
            chosen: the other options, as far as they are given.
        """
        raise NotImplementedError

    def check(
        self, base_model: nn.Module, adapters: Sequence[LoraAdapter], sites: Sequence[Site]
    ) -> None:
        """Raise `ValueError` for options that don't fit the adapters, before anything is built.

        Args:
            base_model: see `molora.compose`.
            adapters: the experts.
            sites: where they are mixed, in the order in which they run.
        """

    def settings(self, adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
        """Fields of `MoloraConfig`: the router, the gate and their options, losses."""
        raise NotImplementedError

    def fill(self, router: Router, site: str, adapters: Sequence[LoraAdapter]) -> None:
        """Write what is known of the adapters into the router of a site; without gradients."""


def one_for_each(name: str, given: Any, adapters: Sequence[LoraAdapter]) -> None:
    """Raise `ValueError` unless an option has an entry for each adapter."""
    if isinstance(given, str | Mapping) or not hasattr(given, "__len__"):
        raise ValueError(
            f"{name} is a {type(given).__name__}; it must be a list with an entry for each adapter."
        )
    if len(given) != len(adapters):
        raise ValueError(f"{name} has {len(given)} entries for {len(adapters)} adapters.")


def matrix(name: str, given: Any) -> Tensor:
    """An option that has a row of finite numbers for each adapter, as a tensor.

    Raises:
        ValueError: it is something else.
    """
    try:
        rows = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be rows of numbers of one length: {error}.") from error
    if rows.dim() != 2:
        raise ValueError(f"{name} has the shape {tuple(rows.shape)}; it needs a row each.")
    if not rows.isfinite().all():
        raise ValueError(f"{name} must be finite numbers.")
    return rows


def trained_or_frozen(train_experts: bool) -> dict[str, Any]:
    """The setting under which the adapters train on, or don't."""
    return {"experts": "lora" if train_experts else "frozen_lora"}


def top_k_settings(top_k: int, adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
    """The gate that keeps each token's `top_k` experts, and weighs them by a softmax over them.

    Raises:
        ValueError: one is to be kept, of several, or it is no number of experts.
    """
    check_count(1)("top_k", top_k)
    if top_k == 1 and len(adapters) > 1:
        raise ValueError("top_k=1: top_k=2 with a small temperature comes as near as you like.")
    return {"gate": "top_k", "top_k": min(top_k, len(adapters))}
