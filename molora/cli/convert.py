"""`molora convert`: checkpoints of other libraries as MoLoRA adapters."""

import argparse
from typing import Any

from ..conversion import FORMATS, plan_conversion


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "convert", help=f"make an adapter of a checkpoint of {'; '.join(FORMATS)}"
    )
    parser.add_argument("source", help="folder or Hub name of the checkpoint")
    parser.add_argument("--base", help="base model; default: the one that the checkpoint names")
    parser.add_argument(
        "--adapters", nargs="+", help="of X-LoRA: the experts' folders, in the classifier's order"
    )
    parser.add_argument("--output", help="folder to be made; not needed with --dry-run")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that isn't empty"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what the adapter would be")
    parser.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> str:
    plan = plan_conversion(options.source, base=options.base, adapters=options.adapters)
    if options.dry_run:
        return plan.describe()
    if options.output is None:
        raise ValueError("give --output, the folder to be made, or --dry-run.")
    folder = plan.save(options.output, overwrite=options.overwrite)
    return "\n".join([*plan.notes, f"wrote {folder}"])
