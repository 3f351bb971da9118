"""Regular files of others: opened without waiting for anybody, and known again by what the file system says of them."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from mlx_moe.errors import InputError

GIT_LFS = b"version https://git-lfs"  # what stands in place of a file that git did not fetch


def open_regular(path: Path) -> int:
    """Open a file to read and return its descriptor.

    Raises InputError where it is a FIFO, a socket, a device or a folder, and OSError where it cannot be opened.
    """
    # The type is asked first, since opening some devices does something; a FIFO would wait for a writer.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError(f"cannot read {path}: it is no regular file; name one, or leave it out")
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def fingerprint(status: os.stat_result) -> list[int]:
    """Size, time of change, inode and time of any change to the inode: other contents have another fingerprint."""
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def is_git_lfs(file: Path) -> bool:
    """Whether a file is git-lfs's note of where the real one is."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        return stream.read(len(GIT_LFS)) == GIT_LFS
    return False
