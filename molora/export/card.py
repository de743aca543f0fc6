"""The model card that every export carries."""

from collections.abc import Iterable
from pathlib import Path

from peft import PeftConfig

from ..version import __version__
from .peft_folder import Source


def write_card(
    folder: Path, title: str, source: Source, paragraphs: Iterable[str], library: str = "peft"
) -> None:
    """Write README.md for what was made from an adapter."""
    method = f" ({source.config.method})" if source.config.method else ""
    origin = f"a mixture of LoRA experts{method}"
    write_page(folder, title, source.config, origin, paragraphs, library)


def write_page(
    folder: Path,
    title: str,
    config: PeftConfig,
    origin: str,
    paragraphs: Iterable[str],
    library: str = "peft",
) -> None:
    """Write README.md with the metadata that the Hub reads.

    Args:
        folder: an existing folder.
        title: of the page.
        config: of the adapter that it is about.
        origin: what it was made from.
        paragraphs: what else there is to say.
        library: which loads it.
    """
    base, method = config.base_model_name_or_path, getattr(config, "method", None)
    tags = ["lora", "molora", *([method] if method else [])]
    lines = ["---", f"library_name: {library}", *([f"base_model: {base}"] if base else [])]
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {title}", ""]
    written = f"Written by molora {__version__} from {origin}"
    lines += [written + (f" for `{base}`." if base else "."), ""]
    for paragraph in paragraphs:
        lines += [paragraph, ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
