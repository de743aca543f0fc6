"""`molora merge`, `molora export`, `molora report`: from an adapter to what can be served."""

import argparse
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..architecture import empty_model
from ..calibration import METHODS
from .models import full_model, read_batches, read_tokenizer
from .options import DATA, add_base, add_batches, add_output, check_output

FORMATS = ("lora", "experts", "bundle", "moe")
ROUTED_FORMATS = FORMATS[1:]  # they need nothing in the routing's place
STATIC_SOURCES = ("task", "prompt", "data")  # where what stands in for the routing comes from
STATIC = (*STATIC_SOURCES, "method", "rank", "rows")  # what says how to make an adapter static
DEFAULT_METHOD = "least_squares"
PLANNED = "say what would be written, and how large it gets"
NOT_COMPARED = (
    "The logits were not compared: there is one batch, and every eighth, from the second on, is "
    "held out for that. Give more rows, or a smaller --batch-size."
)


def add(commands: Any) -> None:
    """Add the commands' parsers."""
    merge = commands.add_parser("merge", help="fold an adapter into its base model")
    _add_adapter(merge)
    _add_static(merge, "of --method low_rank")
    add_output(merge, PLANNED)
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
    _add_static(
        export, "of --method low_rank; without that, cut the adapter to this rank by an SVD"
    )
    add_output(export, PLANNED)
    export.set_defaults(command=_export)
    report = commands.add_parser(
        "report", help="measure what static maps in the place of token routing cost"
    )
    _add_adapter(report)
    _add_data(report, "of low_rank; default: 8")
    report.add_argument(
        "--method", action="append", default=[], metavar="METHOD",
        help=f"repeatable: {', '.join(METHODS)}; default: all",
    )  # fmt: skip
    report.add_argument(
        "--json", metavar="FILE", help="write the figures of each method and module into this file"
    )
    report.set_defaults(command=_report)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="folder or Hub name of a saved adapter")
    add_base(parser, "the adapter")


def _add_data(parser: argparse.ArgumentParser, rank: str) -> None:
    parser.add_argument(
        "--data", metavar="FILE",
        help=f"{DATA}; every eighth batch, from the second on, is held out to compare with",
    )  # fmt: skip
    add_batches(parser)
    parser.add_argument(
        "--ridge", type=float, default=1e-3,
        help="how strongly each method is pulled to the simpler one, larger for little data; "
        "default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--rank", type=int, help=rank)


def _add_static(parser: argparse.ArgumentParser, rank: str) -> None:
    parser.add_argument(
        "--task", type=int, help="number of the task whose routing weights are meant"
    )
    parser.add_argument(
        "--prompt", metavar="TEXT",
        help="the prompt whose routing weights are meant, of routers that decide once for a prompt",
    )  # fmt: skip
    parser.add_argument(
        "--method",
        help=f"how to calibrate on --data: {', '.join(METHODS)}; default: {DEFAULT_METHOD}",
    )
    _add_data(parser, rank)


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
    from ..calibration import collect_moments, comparison, fit_each
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
    chosen = {method: ranks.get(method) for method in methods}
    reports = fit_each(model, moments, chosen, options.ridge, held_out)
    if options.json:
        _write_reports(Path(options.json), reports)
    table = comparison(reports)
    return table if held_out else f"{table}\n\n{NOT_COMPARED}"


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
        options.data, tokenizer, options.batch_size, options.max_length, options.rows, shuffle=True
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
        report = calibrate(model, batches, method, rank, ridge=options.ridge)
        print(report.summary() if report.held_out else f"{report.summary()}\n{NOT_COMPARED}")


def _check_static(options: argparse.Namespace) -> None:
    """Raise `ValueError` for what would have no effect, or has nowhere to go."""
    from ..calibration.calibrate import check_method

    check_output(options)
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
    what = planned(model, options.format, options.rank, given)
    return f"would write {options.output}: {what}" if options.output else f"would write {what}"


def _written(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"wrote {folder}, {size / 2**20:,.1f} MiB"
