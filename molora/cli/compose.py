"""`molora compose`: saved LoRA adapters as the experts of one mixture."""

import argparse
from pathlib import Path
from typing import Any

from ..architecture import empty_model
from ..composition import COMPOSERS, Composer, compose, plan_composition, rank_adapters
from ..config import MIXINGS
from ..export.folder import new_folder
from ..registry import options_of
from .assignments import read_assignment
from .models import full_model, read_batches, read_tokenizer
from .options import DATA, add_base, add_batches, add_output, check_output


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "compose", help="make one mixture of LoRA adapters, which become its experts"
    )
    parser.add_argument("adapters", nargs="+", help="folders or Hub names of LoRA adapters")
    add_base(parser, "the first")
    parser.add_argument(
        "--router", choices=COMPOSERS.names(), default="arrow",
        help="what weighs the experts of a token; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--mixing",
        choices=MIXINGS,
        default="linear",
        help="what is mixed: what each module adds (linear), or the outputs of whole feed-forward "
        "networks; default: %(default)s",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="WEIGHT",
        help="of each adapter, for static; default: all equal",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE",
        help="repeatable: another option of the router, for example --set top_k=2",
    )  # fmt: skip
    parser.add_argument(
        "--data", nargs="+", metavar="FILE",
        help=f"{DATA}: one file of a few examples to fit the weights of static to or to rank by, "
        "or one of each adapter's data for what a router knows of it",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=int, metavar="K", help="compose the K adapters that do best on --data and "
        "aren't alike",
    )  # fmt: skip
    add_batches(parser)
    add_output(parser, "say what the mixture would be")
    parser.set_defaults(command=_compose)


def _compose(options: argparse.Namespace) -> str:
    composer = COMPOSERS.get(options.router)
    known = options_of(composer)
    chosen = dict(read_assignment(text, "option", known) for text in options.set)
    if options.weights is not None:
        chosen["weights"] = options.weights
    _check(options, composer, chosen)
    base = options.model or _base_of(options.adapters[0])
    if options.dry_run:
        return plan_composition(
            empty_model(base), options.adapters, options.router, mixing=options.mixing,
            complete=options.data is None, **chosen,
        ).describe()  # fmt: skip
    with new_folder(options.output, options.overwrite) as folder:
        said = _write(options, composer, chosen, base, folder)
    return f"{said}wrote {options.output}"


def _write(
    options: argparse.Namespace,
    composer: type[Composer],
    chosen: dict[str, Any],
    base: str,
    folder: Path,
) -> str:
    """Fit, rank, compose and save; what is to be said of it, each line ended."""
    model = full_model(base, options.dtype, options.device)
    said, adapters = "", options.adapters
    streams = [_examples(base, path, options) for path in options.data or []]
    if options.keep is not None:
        ranking = rank_adapters(model, adapters, streams[0], options.keep)
        said, adapters = f"{ranking.table()}\n", ranking.chosen
    if streams and _fits(options, composer):
        chosen |= composer.fit(model, adapters, streams, chosen)
    if streams and "weights" in chosen:
        said += f"weights: {', '.join(f'{weight:.4f}' for weight in chosen['weights'])}\n"
    mixture = compose(model, adapters, options.router, mixing=options.mixing, **chosen)
    mixture.peft_config["default"].base_model_name_or_path = base
    mixture.save_pretrained(str(folder))
    if composer.needs_training and len(adapters) > 1:
        said += "the router starts at random: train it before use\n"
    return said


def _check(options: argparse.Namespace, composer: type[Composer], chosen: dict[str, Any]) -> None:
    """Raise `ValueError` for what is missing or would have no effect."""
    files = options.data or []
    if options.rows is not None and not files:
        raise ValueError("--rows has no effect without --data.")
    if options.keep is not None:
        _check_keep(options, composer, chosen)
    if files and not _fits(options, composer) and options.keep is None:
        how = f"--router {options.router} with --mixing {options.mixing}"
        raise ValueError(f"--data: {how} fits nothing to data; leave it out.")
    if files and composer.fitted in chosen:
        raise ValueError(f"--data fits the {composer.fitted}, which are given too; leave one out.")
    wanted = len(options.adapters) if composer.data == "each" else 1
    if files and len(files) != wanted:
        raise ValueError(
            f"--data has {len(files)} files; --router {options.router} takes "
            + ("one, of a few examples." if wanted == 1 else f"{wanted}, one for each adapter.")
        )
    if not files and composer.data == "each" and composer.fitted not in chosen:
        raise ValueError(
            f"--router {options.router} needs --data: a JSONL file for each adapter, with examples "
            "like those that it was trained on."
        )
    for path in files:
        if not Path(path).is_file():
            raise ValueError(f"--data: there is no file {path}.")
    check_output(options)


def _fits(options: argparse.Namespace, composer: type[Composer]) -> bool:
    """Whether the way to compose fits something to --data."""
    if composer.data == "examples":  # the weights of module outputs, of any sum
        return bool(options.mixing == "linear")
    return composer.data is not None


def _check_keep(
    options: argparse.Namespace, composer: type[Composer], chosen: dict[str, Any]
) -> None:
    if composer.data == "each":
        raise ValueError(
            f"--keep ranks by one file of examples, and --router {options.router} takes one for "
            "each adapter; choose by molora.rank_adapters first."
        )
    if not options.data:
        raise ValueError("--keep needs --data: a JSONL file of a few examples to rank by.")
    if "weights" in chosen:
        raise ValueError("--keep chooses adapters, so --weights can't be given for them.")
    if options.dry_run:
        raise ValueError("--keep chooses by computing, which --dry-run doesn't; leave it out.")


def _base_of(adapter: str) -> str:
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} names no base model; give --model.")
    return base


def _examples(base: str, path: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    batches = read_batches(
        path, read_tokenizer(base), options.batch_size, options.max_length, options.rows
    )
    return [
        {
            **{name: tensor.to(options.device) for name, tensor in batch.items()},
            "labels": batch["input_ids"]
            .masked_fill(batch["attention_mask"] == 0, -100)
            .to(options.device),
        }
        for batch in batches
    ]
