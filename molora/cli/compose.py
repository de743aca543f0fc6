"""`molora compose`: saved LoRA adapters as the experts of one mixture."""

import argparse
from pathlib import Path
from typing import Any

from .models import empty_model, full_model, read_batches, read_tokenizer

# The others need gates, which are tensors: molora.compose takes them.
ROUTERS = ("arrow", "static")


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "compose", help="make one mixture of LoRA adapters, its experts, without training"
    )
    parser.add_argument("adapters", nargs="+", help="folders or Hub names of LoRA adapters")
    parser.add_argument("--model", help="base model; default: the one that the first names")
    parser.add_argument("--router", choices=ROUTERS, default="arrow")
    parser.add_argument("--top-k", type=int, help="of arrow; default: 3")
    parser.add_argument("--temperature", type=float, help="of arrow; default: 1")
    parser.add_argument("--weights", type=float, nargs="+", help="of static; default: all equal")
    parser.add_argument(
        "--data", help="JSONL of a few examples to fit the weights of static to: `text`, or "
        "`prompt` and `completion`",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--dtype", default="auto", help="of the base model")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--output", help="folder to be made; not needed with --dry-run")
    parser.add_argument(
        "--overwrite", action="store_true", help="write into a folder that isn't empty"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what the mixture would be")
    parser.set_defaults(command=_compose)


def _compose(options: argparse.Namespace) -> str:
    from ..compose import compose, plan_composition
    from ..compose_fit import fit_weights

    _check(options)
    choices = {name: vars(options)[name] for name in ("top_k", "temperature", "weights")}
    base = options.model or _base_of(options.adapters[0])
    if options.dry_run:
        return plan_composition(
            empty_model(base), options.adapters, options.router, **choices
        ).describe()
    model = full_model(base, options.dtype, options.device)
    said = ""
    if options.data is not None:
        choices["weights"] = fit_weights(model, options.adapters, _examples(base, options))
        said = f"weights: {', '.join(f'{weight:.4f}' for weight in choices['weights'])}\n"
    mixture = compose(model, options.adapters, options.router, **choices)
    mixture.peft_config["default"].base_model_name_or_path = base
    mixture.save_pretrained(options.output)
    return f"{said}wrote {options.output}"


def _check(options: argparse.Namespace) -> None:
    """Raise `ValueError` for what is missing or would have no effect."""
    if options.data is not None and (options.router != "static" or options.weights is not None):
        raise ValueError("--data fits the weights of --router static, in the place of --weights.")
    if options.dry_run:
        return
    if options.output is None:
        raise ValueError("give --output, the folder to be made, or --dry-run.")
    folder = Path(options.output)
    if folder.is_dir() and any(folder.iterdir()) and not options.overwrite:
        raise ValueError(f"{folder} isn't empty; give --overwrite, or another folder.")


def _base_of(adapter: str) -> str:
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} names no base model; give --model.")
    return base


def _examples(base: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    batches = read_batches(
        options.data, read_tokenizer(base), options.batch_size, options.max_length
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
