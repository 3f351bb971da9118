"""Writing what a command makes: whole or not at all, and one line where the disk does not let it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_moe.errors import InputError
from mlx_moe.training.files import make_folder, replacing


@contextmanager
def writing(path: Path, way_out: str = "name another place with --out") -> Iterator[Path]:
    """A name to write a file under; whole, it takes the place of `path`. Raises InputError where that fails."""
    try:
        make_folder(path.parent)
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; {way_out}") from None
