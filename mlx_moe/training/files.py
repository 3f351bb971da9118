"""Writing that a kill cannot tear: files and folders come and go by one rename, and only once they are on the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file or a folder under; whole and on the disk, it takes the place of `path`.

    On an error nothing of it is kept, and what was at `path` stays.
    """
    partial, replaced = _beside(path, "partial"), _beside(path, "replaced")
    delete(partial)
    try:
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            flush(entry)
        if path.is_dir():  # a folder with something in it cannot be replaced in one step
            delete(replaced)
            path.rename(replaced)
        partial.replace(path)
        flush(path.parent)
        delete(replaced)
    except (Exception, KeyboardInterrupt):
        delete(partial)
        _put_back(replaced)
        raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each on the disk when this returns."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def remove(folder: Path) -> None:
    """Delete a folder so that a kill in the middle leaves none that looks whole."""
    removed = _beside(folder, "removed")
    delete(removed)
    folder.rename(removed)
    delete(removed)


def sweep(folder: Path) -> None:
    """Clear away what a kill in `replacing` or `remove` left in a folder, and put back what was to be replaced."""
    for replaced in folder.glob(".*.replaced"):
        _put_back(replaced)
    for ending in ("partial", "replaced", "removed"):
        for leftover in folder.glob(f".*.{ending}"):
            delete(leftover)


def delete(path: Path) -> None:
    """Delete a file or a folder, as far as the system lets us; what stays does no harm under its hidden name."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


def _put_back(replaced: Path) -> None:
    path = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
    if replaced.exists() and not path.exists():
        replaced.rename(path)
