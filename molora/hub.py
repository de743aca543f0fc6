"""Folders that may have to be fetched from the Hub first."""

from pathlib import Path

from huggingface_hub import snapshot_download


def local_folder(source: str | Path) -> Path:
    """The folder of that name, or of the Hub's repository.

    Raises:
        ValueError: it looks like a path, and there is no such folder.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or str(source).startswith(("/", "./", "../")):
        raise ValueError(f"there is no folder {source}.")
    return Path(snapshot_download(str(source)))
