"""Locks between processes, by `flock`; the system releases them when their holder ends, however it ends.

On file systems without `flock` nothing is locked; writes are still atomic, because they end in one rename.
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
UNSUPPORTED.add(errno.EBADF)  # folders on NFS
WAIT_SECONDS, POLL_SECONDS = 10.0, 0.01
LOCK_PREFIX, LOCK_SUFFIX = ".mlxmoe-", ".lock"


class Busy(Exception):
    """Another process holds the lock."""


def acquire(path: Path, shared: bool = False, needed: bool = False, writable: bool = False) -> int:
    """Lock an existing file or folder and return the descriptor that holds the lock; `os.close` releases it.

    Raises Busy if another process holds it, or if a lock is `needed` and the file system supports none, and
    FileNotFoundError if the path was renamed or deleted meanwhile. NFS locks only files opened for writing.
    """
    mode = os.O_RDWR if writable else os.O_RDONLY
    descriptor = os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a FIFO would block until a writer comes
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
    """Acquire a lock, waiting briefly for another process to release it. Raises Busy on timeout."""
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
    """Lock `path`, which need not exist, by a hidden lock file beside it that is deleted at the end."""
    lock = lock_file(path)
    while True:
        os.close(os.open(lock, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666))
        try:
            descriptor = acquire(lock, writable=True)
            break
        except FileNotFoundError:  # the previous holder deleted it meanwhile
            continue
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def lock_file(path: Path) -> Path:
    """Return the lock file of a path: hidden, beside it, with a name of bounded length."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    return path.with_name(f"{LOCK_PREFIX}{digest}{LOCK_SUFFIX}")


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False
