"""Decoding with what a prompt has decided: a low-rank pair at each site in place of its experts.

Where routers decide once for a sequence, the tokens that are generated need no router, no gate and
no expert of weight zero. The first pass that continues a cache routes as always and collects what
its sites come to; the passes after it add that:

    y += B A x                 one prompt, or several that are routed alike
    y += B (g_n . (A x))       prompts n that are routed differently; g_n weighs rank columns
    y += B_n A_n x             the same, of experts that share a factor or mix their factors
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .passes import Pass
from .routing import Routing, SiteInput, weigh_by_logits
from .sharing import borrowed

if TYPE_CHECKING:
    from .experts import Experts
    from .experts.factors import LoraFactors
    from .gates import Gate

# Weights are multiplied into factors in these alone; in narrower ones that would round once more.
WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class PromptFactors:
    """What one site adds for the N sequences of a cache.

    Attributes:
        A: (q, d_in), or (N, q, d_in), in fp32 or fp64.
        B: (d_out, q), or (N, d_out, q).
        gate: (N, q) what a column counts for each sequence; None where that is inside B.
    """

    A: Tensor
    B: Tensor
    gate: Tensor | None = None

    def selected(self, rows: Callable[[Tensor], Tensor]) -> "PromptFactors":
        """Those of other sequences, made of these row by row."""
        if self.A.dim() == 3:
            return PromptFactors(rows(self.A), rows(self.B))
        return self if self.gate is None else PromptFactors(self.A, self.B, rows(self.gate))

    def add(self, x: Tensor, result: Tensor) -> Tensor:
        """`result` plus what it makes of x, in the dtype of `result`.

        Args:
            x: (..., d_in), the tokens of the sequences one after the other.
            result: (..., d_out).
        """
        if self.A.shape[-2] == 0:
            return result
        A, B, gate = self.A, self.B, self.gate
        rows = x.reshape(-1, x.shape[-1]).to(A.dtype)
        base = result.reshape(-1, result.shape[-1])
        if A.dim() == 3:
            inner = rows.view(len(A), -1, rows.shape[-1]) @ A.mT
            return (base + (inner @ B.mT).flatten(0, 1)).to(base.dtype).view_as(result)
        inner = F.linear(rows, A)
        if gate is not None:
            inner = (inner.view(len(gate), -1, gate.shape[-1]) * gate[:, None]).flatten(0, 1)
        if base.dtype == A.dtype:
            return torch.addmm(base, inner, B.mT).view_as(result)
        return (base + F.linear(inner, B)).to(base.dtype).view_as(result)


class PromptMerges:
    """The factors of all sites of a model for the sequences of one cache.

    Copies of the cache share them: once collected, nothing changes them any more.

    Args:
        sequences: N.
        task_ids: the tasks of the sequences, where the pass was given them.
    """

    def __init__(self, sequences: int, task_ids: Tensor | None) -> None:
        self.sequences = sequences
        self.task_ids = task_ids
        self.collecting = True
        self._factors: dict[Experts, PromptFactors] = {}
        self._adapters: dict[Experts, str] = {}
        self._refused: set[str] = set()
        self._read: list[tuple[dict[str, Any], str, Tensor, int]] = []

    def __deepcopy__(self, memo: object) -> "PromptMerges":
        return self

    def factors(self, experts: "Experts") -> PromptFactors | None:
        """What to add in place of a site's experts; None where these are to be routed."""
        return None if self.collecting else self._factors.get(experts)

    def collect(self, gate: "Gate | None", routing: Routing, inputs: SiteInput) -> None:
        """Take what a site has routed, unless the tokens to come may be routed in another way.

        The sites of an adapter hand decisions to one another, so that all of them or none are
        merged.

        Args:
            gate: of the site, if it decides.
            routing: the decision for all tokens of the pass.
            inputs: of the site.
        """
        experts = inputs.experts
        if not self.collecting or inputs.adapter in self._refused or experts is None:
            return
        weights = self._weights(experts, gate, routing, inputs)
        factors = None if weights is None else _merged(experts, weights)
        if factors is None:
            self._refused.add(inputs.adapter)
            return
        self._factors[experts], self._adapters[experts] = factors, inputs.adapter
        for part in (experts, inputs.router, gate):
            if part is not None:
                self._read += [(*found, _version(found[-1])) for found in _state(part)]

    def collected(self) -> "PromptMerges":
        """Itself, when the pass has ended, without the adapters of which a site can't be merged."""
        self.collecting = False
        for experts, adapter in self._adapters.items():
            if adapter in self._refused:
                del self._factors[experts]
        return self

    def selected(self, rows: Callable[[Tensor], Tensor]) -> "PromptMerges | None":
        """Those of other sequences, made of these row by row; None where the sequences change their
        tasks by it, which the passes to come will name."""
        if self.task_ids is not None and len(self.task_ids):
            tasks = self.task_ids.repeat_interleave(self.sequences // len(self.task_ids))
            if not torch.equal(rows(tasks), tasks):
                return None
        other = PromptMerges(len(rows(torch.arange(self.sequences))), self.task_ids)
        other.collecting, other._refused = self.collecting, self._refused
        other._factors = {key: factors.selected(rows) for key, factors in self._factors.items()}
        other._adapters, other._read = self._adapters, self._read
        return other

    def hold(self, given: Pass) -> bool:
        """Whether they stand for the experts in that pass: it has the same sequences and tasks, and
        no parameter has changed."""
        if given.batch != self.sequences or not _equal(given.label("task_ids"), self.task_ids):
            return False
        return all(
            held.get(name) is tensor and _version(tensor) == version
            for held, name, tensor, version in self._read
        )

    def _weights(
        self, experts: "Experts", gate: "Gate | None", routing: Routing, inputs: SiteInput
    ) -> Tensor | None:
        """(N, E) or (N, E + S) what every later token of the sequences gets too; or None."""
        router = inputs.router
        half = any(t.is_floating_point() and t.dtype not in WIDE for _, _, t in _state(experts))
        if experts.training or half or len(routing.weights) % self.sequences:
            return None
        if router is not None and not (router.per_sequence or router.per_task):
            return None
        found = routing.all_weights
        if gate is not None:
            alone = weigh_by_logits(gate, routing.logits, experts, router)
            if alone is None or not torch.equal(alone, found):
                return None
        return found.view(self.sequences, -1, found.shape[-1])[:, -1]


def merges_of(given: Pass) -> PromptMerges | None:
    """What the pass takes in place of experts, or collects; None where its sites just route.

    Sites route in training, with gradients, under autocast or torch.compile, and in passes that
    continue no cache or may bring more of a prompt.
    """
    if not given.first or not given.cached or not given.batch or torch.compiler.is_compiling():
        return None
    source = given.input_ids if given.inputs_embeds is None else given.inputs_embeds
    if source is None or given.encoder_decoder or given.module is None or given.module.training:
        return None
    if source.shape[1] not in (1, given.logits_to_keep) or torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled(source.device.type):
        return None
    kept = None if given.kept is None else given.kept.merges
    if kept is not None and kept.hold(given):
        return kept
    task_ids = given.label("task_ids")
    return PromptMerges(given.batch, None if task_ids is None else task_ids.clone())


@torch.no_grad()
def _merged(experts: "Experts", weights: Tensor) -> PromptFactors | None:
    """The experts with these weights (N, E) or (N, E + S); None where they aren't linear."""
    try:
        if bool((weights == weights[:1]).all()):
            return PromptFactors(*experts.mixed(weights[0]))
        own = _separate(experts)
        if own is None:
            pairs = [experts.mixed(row) for row in weights]
            A, B = (torch.stack(factor) for factor in zip(*pairs, strict=True))
            return PromptFactors(A, B)
    except ValueError:
        return None
    gate = own.per_rank(weights)
    used = (gate != 0).any(0)
    return PromptFactors(own.A[used], own.B[:, used], gate[:, used])


def _separate(experts: "Experts") -> "LoraFactors | None":
    """The experts' factors, if they have them one by one: no mixing and no sharing of them."""
    try:
        factors = experts.lora_factors()
    except ValueError:
        return None
    return factors if factors.tied is None else None


def _state(part: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """All tensors that a site's part reads, those that another site holds too, and where they are
    held."""
    for root in (part, *borrowed(part)):
        for module in root.modules():
            for held in (module._parameters, module._buffers):
                yield from ((held, name, t) for name, t in held.items() if t is not None)


def _version(tensor: Tensor) -> int:
    """Grows when the tensor is written to, but for one of inference mode, which doesn't count."""
    return -1 if tensor.is_inference() else tensor._version


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.device == b.device and torch.equal(a, b)
