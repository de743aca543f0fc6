"""Routing statistics: sums that grow on the device and are read only when someone asks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .routing import Routing


@dataclass
class SiteStatistics:
    """What the tokens of one routing decision looked like since the last reset.

    Attributes:
        share: (E,) share of all selections that went to each expert; sums to 1.
        probability: (E,) mean probability of each expert.
        entropy: mean entropy of the probabilities over its maximum, in [0, 1].
        mean_active: mean number of experts of a token.
        losses: mean of each auxiliary loss, without coefficient.
    """

    share: Tensor
    probability: Tensor
    entropy: float
    mean_active: float
    losses: dict[str, float]

    @property
    def largest_share(self) -> float:
        return float(self.share.max())

    @property
    def dead_experts(self) -> list[int]:
        """Experts that no token selected."""
        return (self.share == 0).nonzero().flatten().tolist()


class RoutingStatistics:
    """Accumulates over forward passes, by site. `update` never waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._losses: dict[str, dict[str, Tensor]] = {}
        self._passes: dict[str, int] = {}

    @torch.no_grad()
    def update(self, site: str, routing: Routing, losses: dict[str, Tensor]) -> None:
        """Add one decision: three sums over its real tokens, in one (2E + 2,) vector."""
        probs = routing.probs.detach().float()
        entropy = -(probs * probs.clamp_min(1e-30).log()).sum(-1, keepdim=True)
        rows = torch.cat(
            [routing.selected.float(), probs, entropy, torch.ones_like(entropy)], dim=-1
        )
        total = rows.sum(0) if routing.mask is None else routing.mask.float() @ rows
        known = self._sums.get(site)
        self._sums[site] = total if known is None else known + total
        terms = self._losses.setdefault(site, {})
        for name, value in losses.items():
            value = value.detach().float()
            terms[name] = terms[name] + value if name in terms else value
        self._passes[site] = self._passes.get(site, 0) + 1

    def sites(self) -> list[str]:
        """The sites seen since the last reset."""
        return list(self._sums)

    def summarize(self) -> dict[str, SiteStatistics]:
        """Bring the sums to the host, as statistics by site."""
        return {site: self._summarize(site) for site in self._sums}

    def reset(self) -> None:
        self._sums.clear()
        self._losses.clear()
        self._passes.clear()

    def _summarize(self, site: str) -> SiteStatistics:
        total = self._sums[site].cpu()
        num_experts = (total.numel() - 2) // 2
        selections, probs = total[:num_experts], total[num_experts : 2 * num_experts]
        entropy, tokens = total[-2], total[-1].clamp(min=1)
        most = torch.log(torch.tensor(float(max(num_experts, 2))))
        passes = self._passes[site]
        return SiteStatistics(
            share=selections / selections.sum().clamp(min=1),
            probability=probs / tokens,
            entropy=float(entropy / tokens / most),
            mean_active=float(selections.sum() / tokens),
            losses={name: float(value) / passes for name, value in self._losses[site].items()},
        )
