"""Which of many adapters to compose, judged by K examples of the task."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..evaluating import evaluating
from ..value_types import is_number, is_whole
from .fitting import Added, Batches, adding, lora_output
from .sources import LoraAdapter, read_loras

Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Ranking:
    """Adapters, how well each does on the examples, and how alike they are.

    Attributes:
        adapters: as they were named.
        losses: mean loss of a label, with each adapter alone.
        base_loss: the same without any.
        scores: what the given function says of each; None without one.
        similarity: (E, E) cosine of the adapters' weight changes, all modules together.
        kept: numbers of those to keep, in the order of their choice.
    """

    adapters: list[str]
    losses: list[float]
    base_loss: float
    scores: list[float] | None
    similarity: Tensor
    kept: list[int]

    @property
    def chosen(self) -> list[str]:
        """The adapters to keep, for `molora.compose`."""
        return [self.adapters[e] for e in self.kept]

    @property
    def perplexities(self) -> list[float]:
        """exp(loss) of each adapter."""
        return [math.exp(loss) for loss in self.losses]

    def table(self) -> str:
        """A row for each adapter, those to keep first, and one without any."""
        width = max(map(len, ("no adapter", *self.adapters)))
        score = "" if self.scores is None else f"  {'score':>8}"
        head = f"{'adapter':<{width}}  {'kept':>4}  {'loss':>8}  {'perplexity':>10}{score}"
        lines = [f"{head}  nearest kept"]
        others = [e for e in range(len(self.adapters)) if e not in self.kept]
        for e in [*self.kept, *sorted(others, key=lambda e: self.losses[e])]:
            place = str(self.kept.index(e) + 1) if e in self.kept else "-"
            score = "" if self.scores is None else f"  {self.scores[e]:>8.4f}"
            near = [float(self.similarity[e, other]) for other in self.kept if other != e]
            nearest = f"{max(near):.3f}" if near else "-"
            lines.append(
                f"{self.adapters[e]:<{width}}  {place:>4}  {self.losses[e]:>8.4f}  "
                f"{self.perplexities[e]:>10.3f}{score}  {nearest:>12}"
            )
        lines.append(
            f"{'no adapter':<{width}}  {'':>4}  {self.base_loss:>8.4f}  "
            f"{math.exp(self.base_loss):>10.3f}"
        )
        return "\n".join(lines)

    __str__ = table


@torch.no_grad()
def rank_adapters(
    base_model: nn.Module,
    adapters: Sequence[str | Path],
    batches: Batches,
    keep: int | None = None,
    *,
    diversity: float = 0.5,
    score: Score | None = None,
) -> Ranking:
    """Score adapters on a few examples, and choose those to compose ("K-shot" selection).

        ranking = molora.rank_adapters(base, shelf, examples, keep=4)
        print(ranking.table())
        model = molora.compose(base, ranking.chosen)

    Selection by performance, perplexity and diversity of the parameters (arXiv 2408.15915). Here
    the three are combined by maximal marginal relevance: the best adapter is kept first, and each
    next one has the largest (1 - diversity) q_e - diversity max cos(B_e A_e, B_k A_k) over the kept
    k. q_e is the quality, the loss or the given score, moved to [0, 1] over the adapters.

    Args:
        base_model: the model that the adapters were trained on; it is left as it was.
        adapters: their folders or Hub names.
        batches: the examples, as keyword arguments of the model's forward, with labels. A label of
            -100 doesn't count: mask the prompt and the loss is that of the answers.
        keep: how many; None ranks all.
        diversity: between 0 (quality alone) and 1 (all that counts after the first one).
        score: what else to judge by, higher is better, such as exact match of generated answers; it
            is called with the base model while one adapter is at work in it. The loss then decides
            between equal scores only.

    Returns:
        What was measured, and the choice.

    Raises:
        ValueError: an adapter can't be composed, there is no label, or an option is out of range.
    """
    loras, _ = read_loras(base_model, adapters)
    keep = _check(len(loras), keep, diversity)
    given = list(batches)
    losses: list[float] = []
    scores: list[float] | None = None if score is None else []
    with evaluating(base_model):
        base_loss = _mean_loss(base_model, given)
        for lora in loras:
            with adding(base_model, lora.factors, _alone(lora)):
                losses.append(_mean_loss(base_model, given))
                if score is not None and scores is not None:
                    scores.append(float(score(base_model)))
    similarity = cosines(loras)
    quality = [-loss for loss in losses] if scores is None else scores
    # A sort that is stable keeps the order of the losses among equal scores.
    order = sorted(sorted(range(len(loras)), key=lambda e: losses[e]), key=lambda e: -quality[e])
    kept = _choose(order, quality, similarity, keep, diversity)
    return Ranking(list(map(str, adapters)), losses, base_loss, scores, similarity, kept)


def _check(count: int, keep: int | None, diversity: float) -> int:
    """How many to keep."""
    if keep is not None and not (is_whole(keep) and 1 <= keep <= count):
        raise ValueError(f"keep={keep!r} must be from 1 to {count}, the adapters.")
    if not is_number(diversity) or not 0 <= diversity <= 1:
        raise ValueError(f"diversity={diversity!r} must be from 0 to 1.")
    return count if keep is None else keep


def cosines(loras: Sequence[LoraAdapter]) -> Tensor:
    """(E, E) cosine similarity of B A over all modules, in fp64.

    <B_i A_i, B_j A_j> = sum of (B_i^T B_j) * (A_i A_j^T), so nothing of size d_out x d_in is made.
    An adapter that changes nothing is like no other.
    """
    inner = torch.zeros(len(loras), len(loras)).double()
    for i, one in enumerate(loras):
        for j, other in enumerate(loras[: i + 1]):
            for site in one.factors.keys() & other.factors.keys():
                A_i, B_i, A_j, B_j = (f.double() for f in one.factors[site] + other.factors[site])
                inner[i, j] += ((B_i.mT @ B_j) * (A_i @ A_j.mT)).sum()
            inner[j, i] = inner[i, j]
    norms = inner.diagonal().sqrt()
    return inner / (norms[:, None] * norms).clamp(min=torch.finfo(norms.dtype).tiny)


def _choose(
    order: list[int], quality: list[float], similarity: Tensor, keep: int, diversity: float
) -> list[int]:
    """Numbers of the adapters to keep; of equal values, the first in `order`."""
    low, high = min(quality), max(quality)
    q = [(value - low) / (high - low) if high > low else 0.0 for value in quality]
    kept = [order[0]]
    while len(kept) < keep:
        rest = [e for e in order if e not in kept]
        nearest = similarity[:, kept].amax(1).tolist()
        kept.append(max(rest, key=lambda e: (1 - diversity) * q[e] - diversity * nearest[e]))
    return kept


def _alone(lora: LoraAdapter) -> Added:
    def added(site: str, x: Tensor) -> Tensor:
        return lora_output(lora, site, x.to(torch.promote_types(x.dtype, torch.float32)))

    return added


def _mean_loss(model: nn.Module, batches: Sequence) -> float:
    """Of a label, over all batches.

    Raises:
        ValueError: the model gives no loss, or there is no label.
    """
    total, count = 0.0, 0
    for batch in batches:
        labels = batch.get("labels")
        loss = None if labels is None else getattr(model(**batch), "loss", None)
        if loss is None:
            raise ValueError("the model gives no loss; let the batches have labels.")
        # A causal model predicts each label but the first from what comes before.
        counted = labels[..., 1:] if "CausalLM" in type(model).__name__ else labels
        labelled = int((counted != -100).sum())
        if labelled:
            total, count = total + float(loss) * labelled, count + labelled
    if not count:
        raise ValueError("no batch has a label that counts; there is nothing to judge by.")
    return total / count
