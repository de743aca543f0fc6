"""`molora merge`, `molora export`, `molora report`: from an adapter to what can be served."""

import argparse
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..architecture import empty_model
from .models import DTYPES, device, full_model, read_batches, read_tokenizer

FORMATS = ("lora", "experts", "bundle", "moe")
ROUTED_FORMATS = FORMATS[1:]  # they need nothing in the routing's place
STATIC_SOURCES = ("task", "prompt", "data")  # where what stands in for the routing comes from
STATIC = (*STATIC_SOURCES, "method", "rank", "rows")  # what says how to make an adapter static
DEFAULT_METHOD = "least_squares"


def add(commands: Any) -> None:
    """Add the commands' parsers."""
    merge = commands.add_parser("merge", help="fold an adapter into its base model")
    _add_adapter(merge)
    _add_static(merge)
    _add_output(merge)
    merge.set_defaults(command=_merge, format="merged")
    export = commands.add_parser(
        "export", help="write an adapter as plain LoRA, or for an engine that routes"
    )
    _add_adapter(export)
    export.add_argument(
        "--format", choices=FORMATS, default="lora",
        help="lora: a static mixture as one PEFT adapter; experts: each as its own; bundle: "
        "experts, router and its semantics; moe: whole networks as a Mixtral, Qwen2-MoE or "
        "Qwen3-MoE model",
    )  # fmt: skip
    _add_static(export)
    _add_output(export)
    export.set_defaults(command=_export)
    report = commands.add_parser(
        "report", help="measure what static maps in the place of token routing cost"
    )
    _add_adapter(report)
    _add_data(report)
    report.add_argument("--method", action="append", default=[], help="repeatable; default: all")
    report.add_argument("--json", help="write the reports into this file")
    report.set_defaults(command=_report)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="folder or Hub name of a saved adapter")
    parser.add_argument("--model", help="base model; default: the one that the adapter names")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the base model")
    parser.add_argument("--device", type=device, default="cpu", help="where to compute")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="JSONL with `text`, or `prompt` and `completion`")
    parser.add_argument("--rows", type=int, help="draw so many of --data at random; default: all")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, help="of low_rank; of export, without it, an SVD's")


def _add_static(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", type=int, help="the task whose routing weights are meant")
    parser.add_argument(
        "--prompt", metavar="TEXT",
        help="the prompt whose routing weights are meant, of routers that decide once for a prompt",
    )  # fmt: skip
    parser.add_argument(
        "--method",
        help="how to calibrate on --data; default: least_squares",
    )
    _add_data(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help="folder to be made")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that isn't empty"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be written, and how large it gets"
    )


def _merge(options: argparse.Namespace) -> str:
    _check_static(options)
    if options.dry_run:
        return _dry_run(options)
    from ..export import save_merged

    model, tokenizer = _load(options)
    _make_static(model, tokenizer, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the card says the same
        folder = save_merged(model, options.output, tokenizer, overwrite=options.overwrite)
    return _written(folder)


def _export(options: argparse.Namespace) -> str:
    _check_static(options)
    if options.dry_run:
        return _dry_run(options)
    from ..export import export_bundle, export_experts, export_lora, export_moe

    model, tokenizer = _load(options)
    output, overwrite = options.output, options.overwrite
    if options.format == "bundle":
        return _written(export_bundle(model, output, overwrite=overwrite))
    if options.format == "experts":
        return _written(export_experts(model, output, overwrite=overwrite))
    if options.format == "moe":
        return _written(export_moe(model, output, tokenizer, overwrite=overwrite))
    _make_static(model, tokenizer, options)
    rank = None if options.method == "low_rank" else options.rank
    return _written(export_lora(model, output, rank, overwrite=overwrite))


def _report(options: argparse.Namespace) -> str:
    from ..calibration import METHODS, collect_moments, comparison, fit
    from ..calibration.calibrate import HELD_OUT_EVERY, check_method

    if options.data is None:
        raise ValueError("report needs --data to calibrate on and to compare with.")
    ranks = {"low_rank": options.rank or 8}
    methods = options.method or METHODS
    maps = [check_method(method, ranks.get(method), options.ridge) for method in methods]
    model, tokenizer = _load(options)
    batches = _read(options, tokenizer)
    held_out = batches[1::HELD_OUT_EVERY]
    fitted = [b for number, b in enumerate(batches) if number % HELD_OUT_EVERY != 1]
    moments = collect_moments(model, fitted, linear_maps=any(maps))
    reports = [
        fit(model, moments, method, ranks.get(method), options.ridge, held_out)
        for method in methods
    ]
    if options.json:
        _write_reports(Path(options.json), reports)
    return comparison(reports)


def _write_reports(path: Path, reports: Iterable[Any]) -> None:
    import json

    rows = [report.to_dict() for report in reports]
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _base_of(options: argparse.Namespace) -> tuple[Any, str]:
    """The adapter's configuration and the name of its base model."""
    from ..config import MoloraConfig

    config = MoloraConfig.from_pretrained(options.adapter)
    if not isinstance(config, MoloraConfig):
        kind = config.peft_type.value
        raise ValueError(f"{options.adapter} holds a {kind} adapter; a MOLORA one is needed.")
    base = options.model or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{options.adapter} names no base model; give --model.")
    return config, base


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    from peft import PeftModel

    _, base = _base_of(options)
    model = full_model(base, options.dtype, options.device)
    loaded = PeftModel.from_pretrained(cast(Any, model), options.adapter)
    return loaded.eval(), read_tokenizer(base)


def _read(options: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    return read_batches(
        options.data, tokenizer, options.batch_size, options.max_length, options.rows
    )


def _make_static(model: nn.Module, tokenizer: Any, options: argparse.Namespace) -> None:
    from ..calibration import calibrate
    from ..fixed_routing import fix_routing

    if options.task is not None:
        fix_routing(model, task=options.task)
    elif options.prompt is not None:
        fix_routing(model, prompt=tokenizer(options.prompt, return_tensors="pt"))
    elif options.data is not None:
        batches = _read(options, tokenizer)
        method = options.method or DEFAULT_METHOD
        rank = options.rank if method == "low_rank" else None
        print(calibrate(model, batches, method, rank, ridge=options.ridge).summary())


def _check_static(options: argparse.Namespace) -> None:
    """Raise `ValueError` for what would have no effect."""
    from ..calibration.calibrate import check_method

    given = [name for name in STATIC if vars(options)[name] is not None]
    if options.format in ROUTED_FORMATS and given:
        raise ValueError(f"--{given[0]} has no effect with --format {options.format}.")
    sources = [f"--{name}" for name in given if name in STATIC_SOURCES]
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(sources)} each say what stands in for the routing.")
    for name in ("method", "rows"):
        if vars(options)[name] is not None and options.data is None:
            raise ValueError(f"--{name} has no effect without --data.")
    method = options.method or DEFAULT_METHOD
    if options.data is not None:
        check_method(method, options.rank if method == "low_rank" else None, options.ridge)
    if options.format == "merged" and options.rank is not None and method != "low_rank":
        raise ValueError("--rank goes with --method low_rank.")


def _dry_run(options: argparse.Namespace) -> str:
    """What the command would write, from the configurations alone."""
    from peft import get_peft_model

    from ..export.plan import planned

    config, base = _base_of(options)
    model = get_peft_model(cast(Any, empty_model(base)), config, low_cpu_mem_usage=True)
    given = any(vars(options)[name] is not None for name in STATIC_SOURCES)
    return planned(model, options.format, options.output, options.rank, given)


def _written(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{folder}: {size / 2**20:,.1f} MiB"
