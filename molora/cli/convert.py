"""`molora convert`: checkpoints of other libraries as MoLoRA adapters."""

import argparse
from typing import Any

from ..conversion import FORMATS, plan_conversion
from .options import add_model, add_output, check_output


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "convert", help=f"make an adapter of a checkpoint of {'; '.join(FORMATS)}"
    )
    parser.add_argument("source", help="folder or Hub name of the checkpoint")
    add_model(parser, "the checkpoint")
    parser.add_argument(
        "--adapters", nargs="+", help="of X-LoRA: the experts' folders, in the classifier's order"
    )
    add_output(parser, "say what the adapter would be")
    parser.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> str:
    plan = plan_conversion(options.source, base=options.model, adapters=options.adapters)
    if options.dry_run:
        return plan.describe()
    check_output(options)
    folder = plan.save(options.output, overwrite=options.overwrite)
    return "\n".join([*plan.notes, f"wrote {folder}"])
