"""What each static stand-in for token routing costs, in the logits and in the answers.

    python train/quickstart.py --config configs/sft/quickstart.yaml \
        --method mola --adapter '{"r": 8}' --output_dir outputs/mola
    python examples/calibrate_and_merge.py outputs/mola

The folder is a quickstart's result. One pass over some of its training problems serves every
method; each is then merged into the base weights, answers the held-out problems, and is unmerged.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from molora.calibration import METHODS, CalibrationReport, Divergence, collect_moments, fit
from molora.cli.models import read_batches

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

from evaluation import evaluate_model
from models import choose_dtype, load_model, load_tokenizer
from quickstart import read_split

HEADER = """\
| in the place of the routing | error of a site (largest) | KL, nats | equal top-1 | exact match |
|---|---|---|---|---|"""


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """The adapter's static maps are in the base weights in the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is an approximation: that's the subject
        model.merge_adapter()
    yield
    model.unmerge_adapter()


def measured(report: CalibrationReport, exact_match: float) -> str:
    """A line of the table."""
    name = report.method + ("" if report.rank is None else f", rank {report.rank}")
    largest = max(site.relative_error for site in report.sites)
    assert report.held_out is not None
    found = report.held_out
    return (
        f"| {name} | {report.relative_error:.3f} ({largest:.3f}) | {found.kl:.4f} | "
        f"{100 * found.top1_agreement:.1f} % | {100 * exact_match:.1f} % |"
    )


def compare(options: argparse.Namespace) -> Iterator[str]:
    """The lines of a Markdown table, each as soon as it is known."""
    base_folder, data = options.folder / "base", options.folder / "data"
    tokenizer = load_tokenizer(str(base_folder))
    base: Any = load_model(str(base_folder), choose_dtype(options.dtype))
    model: Any = PeftModel.from_pretrained(base, options.folder / "adapter").eval()
    problems = read_split(data / "held_out.jsonl")

    def exact_match(name: str) -> float:
        return evaluate_model(model, tokenizer, problems, 64, name)[0]["mean"]

    def batches(split: str, rows: int) -> list[Any]:
        return read_batches(str(data / f"{split}.jsonl"), tokenizer, 8, 512, rows)

    yield HEADER
    yield f"| nothing: it routes | | | | {100 * exact_match('Routed'):.1f} % |"
    compared = batches("held_out", options.compared)
    moments = collect_moments(model, batches("train", options.rows), linear_maps=True)
    found: Divergence | None = None
    for method in METHODS:
        rank = options.rank if method == "low_rank" else None
        report = fit(model, moments, method, rank, held_out=compared)
        with merged(model):
            yield measured(report, exact_match(f"Merged by {method}"))
        found = report.held_out
    with model.disable_adapter():
        base_match = exact_match("No adapter")
    assert found is not None
    yield (
        f"| no adapter | | {found.base_kl:.4f} | {100 * found.base_top1_agreement:.1f} % | "
        f"{100 * base_match:.1f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the ways to make an adapter static.")
    parser.add_argument("folder", type=Path, help="a quickstart's result")
    parser.add_argument("--rows", type=int, default=64, help="training problems to fit to")
    parser.add_argument("--compared", type=int, default=24, help="held-out ones, for the logits")
    parser.add_argument("--rank", type=int, default=16, help="of low_rank")
    parser.add_argument("--dtype", default="auto", help="of the base model")
    for line in compare(parser.parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
