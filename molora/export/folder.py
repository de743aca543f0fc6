"""Folders that appear whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(out_dir: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder beside `out_dir` that takes its name when the block has ended well.

    After an error the scratch folder is gone and `out_dir` is as it was. Only a killed process
    leaves one behind, under a name that starts with a dot.

    Raises:
        FileExistsError: `out_dir` is a file, or isn't empty and `overwrite` is False.
    """
    target = Path(out_dir).absolute()
    in_the_way = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if in_the_way and not (overwrite and target.is_dir()):
        raise FileExistsError(f"{out_dir} is not an empty folder; name another, or overwrite it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        yield scratch
        old = scratch.with_name(scratch.name + ".old")
        if target.exists():
            os.rename(target, old)
        os.rename(scratch, target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
