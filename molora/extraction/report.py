"""How near an extracted adapter is to the fine-tune that it was made from."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Extraction:
    """An adapter that was made from two models.

    Attributes:
        folder: where it lies.
        ranks: of each adapted module.
        errors: |D - B A| / |D| of each, with D the difference of the weights, A and B as written,
            in the Frobenius norm.
        unchanged: targeted modules that don't differ, which it leaves out.
        lost: tensors that differ and that it doesn't hold, with |D| / |base|.
        max_error: what was asked for; None for a rank alone.
    """

    folder: Path
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    lost: dict[str, float] = field(default_factory=dict)
    max_error: float | None = None

    def summary(self) -> str:
        """A line for each kind of module, and what isn't in the adapter."""
        kinds: dict[str, list[str]] = {}
        for site in self.ranks:
            kinds.setdefault(site.rpartition(".")[2], []).append(site)
        width = max(map(len, ("module", *kinds)))
        lines = [f"{'module':<{width}}  {'sites':>5}  {'ranks':>9}  mean error  max error"]
        for kind, sites in kinds.items():
            ranks = sorted({self.ranks[site] for site in sites})
            shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
            errors = [self.errors[site] for site in sites]
            mean = sum(errors) / len(errors)
            lines.append(
                f"{kind:<{width}}  {len(sites):>5}  {shown:>9}  {mean:>10.4f}  {max(errors):>9.4f}"
            )
        return "\n".join([*lines, *self._remarks()])

    def _remarks(self) -> list[str]:
        equal = f"Targeted but equal in both models: {listed(self.unchanged)}."
        return [*([equal] if self.unchanged else []), *self.shortcomings()]

    def shortcomings(self) -> list[str]:
        """What the adapter doesn't hold as asked, in a sentence each."""
        said = []
        if self.lost:
            worst = sorted(self.lost.items(), key=lambda item: -item[1])
            named = listed([f"{name} ({change:.3g})" for name, change in worst])
            said.append(f"Changed by the fine-tune, but not held (|D| / |base|): {named}.")
        far = [site for site, error in self.errors.items() if error > (self.max_error or 1)]
        if far:
            said.append(
                f"max_error={self.max_error} is not reached at {len(far)} modules, {far[0]} among "
                "them: rank cuts them lower, or dtype rounds them."
            )
        return said

    def card(self) -> list[str]:
        """Paragraphs for the model card."""
        rows = [f"| {site} | {self.ranks[site]} | {self.errors[site]:.4g} |" for site in self.ranks]
        table = "\n".join(["| module | rank | relative error |", "|---|---|---|", *rows])
        start = (
            "Truncated singular value decompositions of the difference of two models' weights. The "
            "relative error is |D - B A| / |D| in the Frobenius norm; the largest is "
            f"{max(self.errors.values()):.4g}."
        )
        return [start, *self._remarks(), table]


def listed(names: Collection[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
