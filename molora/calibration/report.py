"""What a calibration found, as numbers, a table and JSON."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("site", "rank", "error", "routing weights")


@dataclass(frozen=True)
class SiteReport:
    """One site.

    Attributes:
        name: the module.
        relative_error: of the static map against the routed experts' output on the calibration
            data, root of the summed squares over root of the summed squares.
        rank: rank of the static map.
        weights: its routing weights; None where it isn't a mixture of the experts.
    """

    name: str
    relative_error: float
    rank: int
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class Divergence:
    """How far the static model is from the routed one on held-out batches.

    Attributes:
        tokens: real positions that were compared.
        kl: mean KL divergence of the static model's distribution from the routed one's, in nats.
        top1_agreement: share of positions where both have the same most likely token.
        base_kl: the same for the model without the adapter: what the whole adapter amounts to.
        base_top1_agreement: the same for the model without the adapter.
    """

    tokens: int
    kl: float
    top1_agreement: float
    base_kl: float
    base_top1_agreement: float


@dataclass(frozen=True)
class CalibrationReport:
    """What `molora.calibrate` found.

    Attributes:
        method: "mean", "least_squares", "full" or "low_rank".
        adapter_name: the adapter.
        rank: the rank asked for, with "low_rank".
        ridge: the ridge.
        tokens: real tokens of the calibration data.
        sites: one entry for each site that was fitted.
        held_out: the comparison of the logits; None without held-out batches.
    """

    method: str
    adapter_name: str
    rank: int | None
    ridge: float
    tokens: int
    sites: tuple[SiteReport, ...]
    held_out: Divergence | None

    @property
    def relative_error(self) -> float:
        """Mean of the sites' relative errors."""
        return sum(site.relative_error for site in self.sites) / len(self.sites)

    def summary(self) -> str:
        """One line, for warnings and model cards."""
        method = self.method + (f" of rank {self.rank}" if self.rank is not None else "")
        line = (
            f"calibrated by {method} on {self.tokens} tokens, mean relative error of the "
            f"{len(self.sites)} sites {self.relative_error:.3g}"
        )
        if self.held_out is None:
            return line + ", not compared on held-out data"
        return line + f"; on {self.held_out.tokens} held-out tokens {_compared(self.held_out)}"

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [COLUMNS]
        rows += [
            (
                site.name,
                str(site.rank),
                f"{site.relative_error:.4f}",
                "-" if site.weights is None else " ".join(f"{w:.3f}" for w in site.weights),
            )
            for site in self.sites
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{name:<{widths[0]}}  {rank:>{widths[1]}}  {error:>{widths[2]}}  {weights}"
            for name, rank, error, weights in rows
        ]
        return "\n".join([*lines, self.summary()])

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationReport":
        """Read what `save` wrote."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        sites = tuple(
            SiteReport(**{**site, "weights": site["weights"] and tuple(site["weights"])})
            for site in values["sites"]
        )
        held_out = values["held_out"] and Divergence(**values["held_out"])
        return cls(**{**values, "sites": sites, "held_out": held_out})


def comparison(reports: Iterable[CalibrationReport]) -> str:
    """Several reports as a Markdown table, a line for each, and one without the adapter."""
    lines = [
        "| method | mean relative error | KL, nats | equal top-1 |",
        "|---|---|---|---|",
    ]
    held_out = None
    for report in reports:
        method = report.method + (f", rank {report.rank}" if report.rank is not None else "")
        cells = ["-", "-"]
        held_out = report.held_out or held_out
        if report.held_out is not None:
            cells = _cells(report.held_out.kl, report.held_out.top1_agreement)
        lines.append(f"| {method} | {report.relative_error:.4f} | {' | '.join(cells)} |")
    if held_out is not None:
        cells = _cells(held_out.base_kl, held_out.base_top1_agreement)
        lines.append(f"| no adapter | - | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(kl: float, top1_agreement: float) -> list[str]:
    return [f"{kl:.4f}", f"{100 * top1_agreement:.1f} %"]


def _compared(found: Divergence) -> str:
    return (
        f"KL {found.kl:.4g} nats (of {found.base_kl:.4g} that the adapter makes) and "
        f"{100 * found.top1_agreement:.2f} % equal top-1 "
        f"({100 * found.base_top1_agreement:.2f} % without the adapter)"
    )
