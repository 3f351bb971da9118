"""Locks between processes, by `flock`: the system lets go of them when their holder ends, however it ends.

Where a file system knows no `flock`, nothing is locked; what is written is still whole, because it appears by
one rename.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
UNSUPPORTED.add(errno.EBADF)  # of a folder on NFS
WAIT_SECONDS, POLL_SECONDS = 10.0, 0.01
LOCK_PREFIX, LOCK_SUFFIX = ".mlxmoe-", ".lock"


class Busy(Exception):
    """Another process holds the lock."""


def acquire(path: Path, shared: bool = False, needed: bool = False, writable: bool = False) -> int:
    """Lock a file or a folder that exists, and return the descriptor that holds it; `os.close` lets go.

    Raises Busy where another process holds it, or where a lock is `needed` and the file system knows none, and
    FileNotFoundError where it was renamed or deleted in the meantime. NFS locks only what is opened to be written.
    """
    mode = os.O_RDWR if writable else os.O_RDONLY
    descriptor = os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait for a writer
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(str(path)) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            if needed:
                raise Busy(str(path)) from None
        if not _is_at(descriptor, path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def wait_for(path: Path, shared: bool = False) -> int:
    """`acquire`, waiting for the moment that another process holds it; Busy where that takes long."""
    until = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return acquire(path, shared=shared)
        except Busy:
            if time.monotonic() > until:
                raise
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Hold the place of `path`, which need not exist, by a hidden lock file beside it that goes at the end.

    Raises Busy where another process holds it.
    """
    lock = lock_file(path)
    while True:
        os.close(os.open(lock, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666))
        try:
            descriptor = acquire(lock, writable=True)
            break
        except FileNotFoundError:  # its last holder deleted it in the meantime
            continue
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def lock_file(path: Path) -> Path:
    """The lock file of a place: hidden, beside it, and never too long a name."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    return path.with_name(f"{LOCK_PREFIX}{digest}{LOCK_SUFFIX}")


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False
