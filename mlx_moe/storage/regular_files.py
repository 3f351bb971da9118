"""Opening of regular files without blocking, and fingerprints to detect changes."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from mlx_moe.errors import InputError

GIT_LFS = b"version https://git-lfs"  # start of the pointer file that stands in for a file git did not fetch


def open_regular(path: Path) -> int:
    """Open a file for reading and return its descriptor.

    Raises InputError if it is a FIFO, socket, device or folder, and OSError if it cannot be opened.
    """
    # Check the type first: opening some devices has side effects, and opening a FIFO blocks.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError(f"cannot read {path}: it is no regular file; name one, or leave it out")
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def fingerprint(status: os.stat_result) -> list[int]:
    """Return size, mtime, inode and ctime: a changed file has another fingerprint."""
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def is_git_lfs(file: Path) -> bool:
    """Return whether a file is a git-lfs pointer in place of the real one."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        return stream.read(len(GIT_LFS)) == GIT_LFS
    return False
