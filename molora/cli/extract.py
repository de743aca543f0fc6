"""`molora extract`: a LoRA adapter from a full fine-tune."""

import argparse
import json
import warnings
from typing import Any

import torch

from ..extraction import extract_lora, plan_extraction
from .models import DTYPES, device
from .options import add_output, check_output


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "extract", help="make a LoRA adapter of what a full fine-tune changed"
    )
    parser.add_argument("base", help="folder or Hub name of the model before")
    parser.add_argument("tuned", help="folder or Hub name of the model after")
    parser.add_argument(
        "--rank", help='one number, or JSON of one by regex of the module: {"mlp.*": 64, ".*": 16}'
    )
    parser.add_argument(
        "--max-error",
        type=float,
        help="the lowest rank whose relative error (Frobenius norm, 0 to 1) is at most this, up to "
        "--rank where it is given",
    )
    parser.add_argument(
        "--targets", nargs="+", default=["all-linear"],
        help="names of modules; default: every linear module but the output head",
    )  # fmt: skip
    parser.add_argument(
        "--allow-loss", action="store_true", help="leave out what else the fine-tune changed"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES[1:], default="float32", help="of the file; default: %(default)s"
    )
    parser.add_argument("--device", type=device, default="cpu", help="where to decompose")
    add_output(parser, "say how large the adapter gets")
    parser.set_defaults(command=_extract)


def _extract(options: argparse.Namespace) -> str:
    try:
        rank = None if options.rank is None else json.loads(options.rank)
    except json.JSONDecodeError as error:
        raise ValueError(f"--rank {options.rank} is neither a number nor JSON.") from error
    dtype = getattr(torch, options.dtype)
    targets = "all-linear" if options.targets == ["all-linear"] else options.targets
    chosen = {"max_error": options.max_error, "targets": targets}
    if options.dry_run:
        return plan_extraction(options.base, rank, **chosen).describe(dtype)
    check_output(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the summary says the same
        report = extract_lora(
            options.base,
            options.tuned,
            options.output,
            rank,
            allow_loss=options.allow_loss,
            dtype=dtype,
            device=options.device,
            overwrite=options.overwrite,
            **chosen,
        )
    return f"{report.summary()}\nwrote {report.folder}"
