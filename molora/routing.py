"""The record that routing leaves behind, and the letters every shape is written in.

T tokens of the flattened batch, E routed experts, K active experts of a token, R total rank of a
site (the ranks of its experts added up, shared ones included), r rank of one expert, d_in, d_out.
"""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .experts import Experts
    from .gates import Gate
    from .passes import Pass
    from .routers import Router
    from .tokens import Tokens


NO_EXTRAS: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(slots=True, eq=False)
class SiteInput:
    """What a router, a gate or a loss may read at one site; nobody changes it.

    It isn't frozen, because that makes it four times as slow to build, and a generation builds one
    for every site and token.

    Attributes:
        hidden: (T, d_in) the site's input, in the model's dtype.
        mask: (T,) bool, False for padding; None when every token is real.
        shape: the leading dimensions that were flattened into T, usually (batch, sequence).
        experts: the site's experts, for what routes by, or penalises, their factors.
        router: the router of the decision, for what reads or sets its weights; None for a site
            that follows another's decision.
        output: (T, d_out) the base layer's output, for a router that `reads_output`; else None.
        given: what the pass was given; None outside of a pass of the base model.
        rows: the rows of the batch that these are, where it mixes adapters; None for all.
        site: the site's name.
        leader: the name of the site that decides, where one decides for the whole model.
        adapter: the adapter's name.
    """

    hidden: Tensor
    mask: Tensor | None = None
    shape: tuple[int, ...] = ()
    experts: "Experts | None" = None
    router: "Router | None" = None
    output: Tensor | None = None
    given: "Pass | None" = None
    rows: Tensor | None = None
    site: str = ""
    leader: str = ""
    adapter: str = ""

    @property
    def deciding_site(self) -> str:
        """The name of the site whose router and gate decide."""
        return self.leader or self.site

    @property
    def labels(self) -> Mapping[str, Tensor]:
        """What came with the batch, by name: "task_ids" (batch,), "instance_scores" (batch, E).
        What speaks of tokens or sequences is better read from `tokens`."""
        return {} if self.given is None else {**self.given.standing, **self.given.labels}

    @property
    def cached(self) -> bool:
        """Whether the pass writes or reads a KV cache: other tokens of the sequence may come in
        other passes."""
        return self.given is not None and self.given.cached

    @property
    def tokens(self) -> "Tokens | None":
        """What is known of each of the T tokens: its sequence, its place, whether it is of the
        prompt, its id, its modality. None outside of a pass of the base model.
        """
        given = self.given
        if given is None or given.module is None:
            return None
        if self.rows is None:
            return given.tokens(self.shape, self.mask, self.hidden.device, self.site)
        return given.tokens_of_rows(self.shape, self.mask, self.hidden.device, self.site, self.rows)


class Routing:
    """One routing decision: what losses, statistics and exports read. It can't be changed.

    Attributes:
        weights: (T, E) routing weights, exactly zero for the experts that a token does not use.
        logits: (T, E) what the gate read, in fp32 and before any softmax.
        probs: (T, E) the router's distribution over all experts, before selection; rows sum to 1.
            Without it, the softmax of the logits, which a generation then never computes.
        mask: (T,) bool, False for padding; None when every token is real.
        shared_weights: (T, S) weights of the S shared experts; None when all of them are 1.
        extras: what a gate leaves to a loss of its own method, by name; (T, ...) each.

    A router may give more logits than there are experts (one for "no expert", say), and then
    `logits` has as many columns.
    """

    __slots__ = ("_probs", "extras", "logits", "mask", "shared_weights", "weights")
    weights: Tensor
    logits: Tensor
    _probs: Tensor | None
    mask: Tensor | None
    shared_weights: Tensor | None
    extras: Mapping[str, Tensor]

    def __init__(
        self,
        weights: Tensor,
        logits: Tensor,
        probs: Tensor | None = None,
        mask: Tensor | None = None,
        shared_weights: Tensor | None = None,
        extras: Mapping[str, Tensor] = NO_EXTRAS,
    ) -> None:
        if probs is None and torch.is_grad_enabled():
            # At once, whoever reads it: a pass and its recomputation must build the same graph.
            probs = logits.softmax(-1)
        fix = object.__setattr__
        fix(self, "weights", weights)
        fix(self, "logits", logits)
        fix(self, "_probs", probs)
        fix(self, "mask", mask)
        fix(self, "shared_weights", shared_weights)
        fix(self, "extras", extras)

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    @property
    def probs(self) -> Tensor:
        return self.logits.softmax(-1) if self._probs is None else self._probs

    @property
    def all_weights(self) -> Tensor:
        """What the experts read: (T, E), or (T, E + S) when the shared ones are weighted too."""
        if self.shared_weights is None:
            return self.weights
        return torch.cat([self.weights, self.shared_weights], -1)

    @property
    def selected(self) -> Tensor:
        """(T, E) bool: the experts each token uses."""
        return self.weights != 0

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weights.shape[-1]

    def with_mask(self, mask: Tensor | None) -> "Routing":
        """The same decision, with the tokens that count."""
        return Routing(
            self.weights, self.logits, self._probs, mask, self.shared_weights, self.extras
        )

    def detach(self) -> "Routing":
        """The same decision without its graph, and without extras."""
        shared = self.shared_weights
        return Routing(
            self.weights.detach(),
            self.logits.detach(),
            None if self._probs is None else self._probs.detach(),
            self.mask,
            None if shared is None else shared.detach(),
        )

    def token_mean(self, values: Tensor) -> Tensor:
        """Mean of per-token values over the real tokens: (T, ...) -> (...); 0 if there is none.

        The mask multiplies instead of indexing, so nothing waits for the device and
        `torch.compile` sees no data-dependent shape.
        """
        if self.mask is None:
            return values.sum(0) / max(values.shape[0], 1)
        weight = self.mask.to(values.dtype)
        total = torch.tensordot(weight, values, dims=1)
        return total / weight.sum().clamp(min=1)


class _LogitsAlone:
    """A site without its tokens, for a gate that shall read none."""

    mask = None

    def __init__(self, experts: "Experts | None", router: "Router | None") -> None:
        self.experts, self.router = experts, router

    def __getattr__(self, name: str) -> Any:
        raise _ReadsTokensError(name)


class _ReadsTokensError(Exception):
    """The gate asked for more than logits."""


def weigh_by_logits(
    gate: "Gate", logits: Tensor, experts: "Experts | None" = None, router: "Router | None" = None
) -> Tensor | None:
    """(T, E), or (T, E + S), the weights that a gate gives for logits and nothing else, in the mode
    that it is in; None where it reads more of a token, so that equal logits needn't mean equal
    weights.
    """
    inputs = cast(SiteInput, _LogitsAlone(experts, router))
    try:
        routing: Routing = gate(logits, inputs)
    except _ReadsTokensError:
        return None
    return routing.all_weights


def concatenate(records: list[Routing]) -> Routing:
    """Several decisions of one router, one after another along T."""
    if len(records) == 1:
        return records[0]
    if all(record.mask is None for record in records):
        mask = None
    else:
        masks = [
            torch.ones(r.weights.shape[0], dtype=torch.bool, device=r.weights.device)
            if r.mask is None
            else r.mask
            for r in records
        ]
        mask = torch.cat(masks)
    shared = [r.shared_weights for r in records if r.shared_weights is not None]
    return Routing(
        torch.cat([r.weights for r in records]),
        torch.cat([r.logits for r in records]),
        torch.cat([r.probs for r in records]),
        mask,
        torch.cat(shared) if shared else None,
    )


def is_recomputation() -> bool:
    """Whether a checkpointed forward is being run again inside backward; unknown, hence False,
    where torch.compile traces, which breaks its graph at the question."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
