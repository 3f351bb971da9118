"""Atomic writes that survive a kill and never overwrite other people's files.

A file or folder is written in a scratch folder beside its destination, flushed, and renamed into place. A file may
replace a file, never a folder; a folder replaces nothing. The process that made a scratch folder locks it, so leftovers
of dead processes differ from work in progress.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_moe.errors import InputError, is_out_of_memory, one_line, quoted
from mlx_moe.storage import locks
from mlx_moe.terminal import DELETED

SCRATCH = ".mlxmoe-partial-"
# Every file that a command writes carries this in its first bytes; a command overwrites only such files.
SIGNATURE = "written by mlxmoe"
SIGNED_WITHIN = 4096  # bytes
# Places of the signature: a comment at the top, the first key of JSON, the metadata of SVG and PNG.
SIGNED = (
    rb"(<!doctype html>\n)?<!-- %s -->",
    rb'\{\s*"generator": "%s"',
    rb"<\?xml .*<dc:title>%s</dc:title>",
    rb"\x89PNG\r\n\x1a\n.{,200}Software\0%s",
)
STALE_SECONDS = 60
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Files that operating systems create in folders.
SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write a file under; on success the file is flushed and replaces the one at `path`.

    A symbolic link is kept and its target replaced. Raises IsADirectoryError if `path` is a folder, and InputError if
    it is a device or FIFO. On an error the new file is removed and `path` stays as it was.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if target.exists() and not target.is_file():  # a privileged user could replace a device
        raise InputError(f"{path} is no regular file, or a link to none; move it away")
    with _scratch(target.parent) as scratch:
        partial = scratch / target.name
        yield partial
        flush(partial)
        partial.replace(target)
        flush(target.parent)


@contextlib.contextmanager
def new_folder(path: Path, aside: str | None = None) -> Iterator[Path]:
    """Yield a folder to fill; on success it is flushed and renamed to `path`, which must be free or an empty folder.

    Raises FileExistsError if something is there, or appeared meanwhile; with `aside`, an existing entry is renamed with
    that suffix instead. On an error the new folder is removed.
    """
    if aside is None:
        check_free(path)
    with _scratch(path.parent) as scratch:
        partial = scratch / "folder"
        partial.mkdir()
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            flush(entry)
        if aside is not None and os.path.lexists(path):
            quarantine(path, aside)
        try:
            with _free_of_others(path):
                partial.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            raise
        flush(path.parent)


def check_free(path: Path) -> None:
    """Raise FileExistsError unless `path` is free, or an empty folder other than the working directory."""
    if not os.path.lexists(path):
        return
    is_empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if not is_empty or path.samefile(Path.cwd()):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


@contextlib.contextmanager
def writing(
    path: Path, name: str | None, command: str, is_own_place: bool = False, remedy: str = "name another --out"
) -> Iterator[Path]:
    """Lock the destination of a command's file and yield a temporary name; on success the file replaces `path`.

    Enter it before the work begins, so that an impossible destination is reported at once. If `path` is a folder, the
    file is `name` in it; without a `name` a folder is refused. An existing file is overwritten only if the same
    `command` wrote it (`is_signed`) or if the place is ours by definition (`is_own_place`: the default name in a run's
    folder). Raises InputError, with the `remedy`, if the place is taken, cannot be written, or is locked by another
    process.
    """
    with _reported(path, remedy):
        target = output_file(path, name) if name else absolute(path)
        _check_replaceable(target, command, is_own_place, remedy)
        if target.is_symlink():  # the lock and the leftovers are beside the file itself
            target = Path(os.path.realpath(target))
            if not target.parent.is_dir():
                raise InputError(f"{path} is a link into {target.parent}, which is no folder; {remedy}")
        with _held(target), replacing(target) as partial:
            yield partial
            _check_replaceable(target, command, is_own_place, remedy)  # a file may have appeared there during the work


@contextlib.contextmanager
def creating(path: Path) -> Iterator[Path]:
    """Lock the destination of a command's folder and yield a folder to fill; on success it is renamed to `path`.

    Enter it before the work begins. Raises InputError if `path` exists, cannot be written, or is locked by another
    process.
    """
    with _reported(path, "name another place"):
        target = absolute(path)
        with _held(target):  # clean up before refusing: a kill may have left scratch folders
            try:
                check_free(target)
            except FileExistsError:
                raise InputError(f"{path} exists already; name a folder that does not exist") from None
            with new_folder(target) as partial:
                yield partial


def signature(command: str) -> str:
    """Return the text that marks a file as written by `command`, which may then overwrite it."""
    return f"{SIGNATURE} {command}"


def output_file(path: Path, name: str) -> Path:
    """Return the file meant by a command's `--out`: `name` in it if it is a folder, else the path itself."""
    target = absolute(path)
    return target / name if target.is_dir() else target


def absolute(path: Path) -> Path:
    """Return the absolute path, with `~` expanded.

    Raises InputError for a `~user` that does not exist, and for a path that no file can have: with a NUL byte, or too
    long.
    """
    if str(path) == path.root:
        raise InputError(f"{path} is the root of all folders; name one in it")
    if "\0" in str(path):
        raise InputError(f"{quoted(str(path))} holds a NUL byte, which no path may; leave it out")
    try:
        expanded = Path(os.path.abspath(path.expanduser()))  # resolve `..` in the text, as the shell's `cd` does
    except RuntimeError as error:
        raise InputError(f"{quoted(str(path))}: {one_line(error).rstrip('.')}; write the folder out") from None
    except FileNotFoundError:
        raise InputError(DELETED) from None
    try:
        os.lstat(expanded)
    except OSError as error:  # callers report a missing or unreadable path
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{quoted(str(path))}: {error.strerror}; shorten it") from None
    return expanded


def cache_folder() -> Path:
    """Return the cache folder, MLXMOE_CACHE or ~/.cache/mlxmoe. Raises InputError if the path is invalid."""
    try:
        return absolute(Path(os.environ.get("MLXMOE_CACHE") or "~/.cache/mlxmoe"))
    except InputError as error:
        raise InputError(f"cannot use the token cache ({error}); set MLXMOE_CACHE to a folder you can write") from None


def make_folder(path: Path) -> list[Path]:
    """Create a folder and its parents, flush each, and return the ones that were created."""
    missing, made = [], list[Path]()
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    try:
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                made.append(folder)
                flush(folder.parent)
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    except BaseException:
        _remove_empty(made)
        raise
    return made


def remove_folder(folder: Path, is_ours: Callable[[Path], bool]) -> bool:
    """Delete a folder of ours so that a kill midway leaves nothing that looks complete; return False if it is kept.

    It is kept if another process reads it (`locks.acquire(folder, shared=True)`), or if it contains anything for which
    `is_ours` (given the relative path) is false.
    """
    try:
        descriptor = locks.acquire(folder)
    except (locks.Busy, FileNotFoundError):
        return False
    try:
        inside = [entry.relative_to(folder) for entry in folder.rglob("*") if entry.name not in SYSTEM_FILES]
        if not all(is_ours(entry) for entry in inside):
            return False
        with _scratch(folder.parent) as scratch:
            folder.rename(scratch / "removed")
        return True
    finally:
        os.close(descriptor)


def quarantine(path: Path, reason: str) -> Path:
    """Rename a file or folder to `NAME.REASON`, or `NAME.REASON-2` and so on; return the new path."""
    number = 1
    while True:
        aside = path.with_name(f"{path.name}.{reason}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(aside):
            path.rename(aside)
            return aside
        number += 1


def clean_leftovers(folder: Path) -> None:
    """Delete scratch folders and lock files that dead processes left in a folder."""
    scratch = [path for path in folder.glob(f"{SCRATCH}*") if path.is_dir() and not path.is_symlink()]
    # A recent lock file may belong to a process that has not locked it yet.
    stale = [path for path in folder.glob(f"{locks.LOCK_PREFIX}*{locks.LOCK_SUFFIX}") if _is_old_file(path)]
    for leftover in [*scratch, *stale]:
        with contextlib.suppress(OSError, locks.Busy):
            descriptor = locks.acquire(leftover, needed=True)  # without a lock, another process may be writing it
            try:
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
            finally:
                os.close(descriptor)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """Yield a locked scratch folder in `parent`; delete it with its contents at the end."""
    while True:
        scratch = parent / f"{SCRATCH}{os.urandom(6).hex()}"
        scratch.mkdir()
        try:
            descriptor = locks.acquire(scratch)
            break
        except (locks.Busy, FileNotFoundError):  # another process removed it as a leftover before it was locked
            continue
    try:
        yield scratch
    finally:
        try:
            shutil.rmtree(scratch, ignore_errors=True)
        finally:
            os.close(descriptor)


def _remove_empty(folders: list[Path]) -> None:
    for path in reversed(folders):
        with contextlib.suppress(OSError):  # not empty: the work produced something
            path.rmdir()


@contextlib.contextmanager
def _free_of_others(path: Path) -> Iterator[None]:
    """Lock the empty folder at `path`, if there is one, so that no run starts in it.

    Raises FileExistsError if a run has started there.
    """
    descriptor = None
    try:
        with contextlib.suppress(FileNotFoundError):
            descriptor = locks.acquire(path)
        yield
    except locks.Busy:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def _held(target: Path) -> Iterator[None]:
    """Lock a destination during the work, creating its folders; remove those that are still empty afterwards.

    Deletes leftovers of killed processes beside it. Raises InputError if another process holds the lock.
    """
    made = list[Path]()
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        while True:
            made += make_folder(target.parent)
            clean_leftovers(target.parent)
            try:
                stack.enter_context(locks.holding(target))
                break
            except locks.Busy:
                raise InputError(f"another process is writing {target}; wait for it, or name another place") from None
            except FileNotFoundError:  # another process created the folder too, and removed it again
                if target.parent.is_dir():
                    raise
        yield


def culprit(error: OSError, written: Path) -> Path:
    """Return the file that an OSError names; `written` where it names none, or a temporary file of ours."""
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    is_passing = named is not None and any(part.startswith(locks.LOCK_PREFIX) for part in named.parts)
    return written if named is None or is_passing else named


@contextlib.contextmanager
def _reported(path: Path, remedy: str) -> Iterator[None]:
    """Convert errors of the file system, of reads as well as writes, to a one-line InputError; MemoryError passes."""
    try:
        yield
    except FileExistsError:
        raise InputError(f"{path} appeared meanwhile and was not changed; {remedy}") from None
    except OSError as error:
        if is_out_of_memory(error):
            raise
        said, about = error.strerror or one_line(error), culprit(error, path)
        if error.errno in NO_ROOM:
            remedy = f"nothing of it was kept; make room, or {remedy}"
        elif error.filename is None:
            raise InputError(f"cannot write {path}, or read what goes into it: {said}; {remedy}") from None
        if about not in (path, absolute(path), *absolute(path).parents):
            raise InputError(f"cannot use {about}: {said}; nothing was written") from None
        raise InputError(f"cannot write {path}: {said}; {remedy}") from None


def _is_old_file(path: Path) -> bool:
    with contextlib.suppress(OSError):
        status = path.lstat()
        return stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > STALE_SECONDS
    return False


def _check_replaceable(target: Path, command: str, is_own_place: bool, remedy: str) -> None:
    if not os.path.lexists(target):
        return
    if target.is_dir():
        raise InputError(f"{target} is a folder; {remedy}")
    if os.path.islink(os.path.realpath(target)):
        raise InputError(f"{target} is a link that leads back to itself; {remedy}")
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise InputError(f"{target} is no regular file; {remedy}")
    if target.exists() and not is_own_place and not is_signed(target, command):
        raise InputError(f"{target} exists and was not written by this command; delete it first, or {remedy}")


def is_signed(file: Path, command: str) -> bool:
    """Return whether a file has the command's signature in the place that its format reserves for it.

    Text that merely mentions mlxmoe does not count. An empty file does: it has nothing to lose.
    """
    with file.open("rb") as stream:
        head = stream.read(SIGNED_WITHIN)
    signed = re.escape(signature(command).encode())
    return not head or any(re.match(pattern % signed, head, re.DOTALL) for pattern in SIGNED)
