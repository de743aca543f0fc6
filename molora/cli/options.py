"""Options that several commands have."""

import argparse

from .models import DTYPES, device

DATA = "JSONL with `text`, or `prompt` and `completion`"


def add_base(parser: argparse.ArgumentParser, named_by: str) -> None:
    """The base model, how it is loaded and where."""
    add_model(parser, named_by)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the base model")
    parser.add_argument("--device", type=device, default="cpu", help="where to compute")


def add_model(parser: argparse.ArgumentParser, named_by: str) -> None:
    """The base model."""
    parser.add_argument("--model", help=f"base model; default: the one that {named_by} names")


def add_batches(parser: argparse.ArgumentParser) -> None:
    """How --data is read, beside which they stand."""
    parser.add_argument(
        "--rows", type=int, help="draw so many of each file of --data at random; default: all"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="rows of a batch; default: %(default)s"
    )
    parser.add_argument(
        "--max-length", type=int, default=512,
        help="tokens of a row, longer ones are cut; default: %(default)s",
    )  # fmt: skip


def add_output(parser: argparse.ArgumentParser, dry_run: str) -> None:
    """Where to, and whether at all, for which see `check_output`."""
    parser.add_argument("--output", help="folder to be made; not needed with --dry-run")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that isn't empty"
    )
    parser.add_argument("--dry-run", action="store_true", help=dry_run)


def check_output(options: argparse.Namespace) -> None:
    """Raise `ValueError` where there is nowhere to write to."""
    if options.output is None and not options.dry_run:
        raise ValueError("give --output, the folder to be made, or --dry-run.")
