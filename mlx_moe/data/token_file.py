"""Files of token ids, checked against their SHA-256 and read without memory-mapping.

If another process truncated a mapped file, this one would die of SIGBUS, and ids beyond the vocabulary make a backend
access memory outside its arrays. Every read is checked, so that either becomes a one-line error.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_moe.errors import InputError, one_line
from mlx_moe.storage.regular_files import fingerprint, open_regular

StoredTokens = NDArray[np.uint16] | NDArray[np.uint32]

BYTES_AT_ONCE = 4 << 20


@dataclass(frozen=True)
class Contents:
    """Hash and largest id of a file with the given fingerprint. `largest_id` is -1 if it holds no token."""

    sha256: str
    largest_id: int
    fingerprint: list[int]


class TokenFile:
    """Token ids of a file, one-dimensional and read-only, indexed like an array; `windows` reads batches.

    `contents` describes the file as last hashed. It is hashed on opening, unless `known` contents match its
    fingerprint, and again whenever the fingerprint changes.

    Raises InputError, on opening and on every access, unless the file holds `n_tokens` ids with this SHA-256, all below
    `vocab_size`.
    """

    def __init__(
        self, path: Path, dtype: np.dtype[Any], n_tokens: int, sha256: str, vocab_size: int, known: Contents | None
    ):
        self.path, self.dtype = path, dtype
        self._n_tokens, self._sha256, self._vocab_size = n_tokens, sha256, vocab_size
        try:
            self._descriptor = open_regular(path)
        except OSError as error:
            raise self._unreadable(error) from None
        weakref.finalize(self, os.close, self._descriptor)
        self.contents = known or Contents("", -1, [])
        self._check()

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self[:][index]
        start, stop, step = index.indices(self._n_tokens)
        return self._read([start], max(0, stop - start))[0] if step == 1 else self[:][index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:] if dtype is None else self[:].astype(dtype)

    def windows(self, starts: NDArray[np.int64], width: int) -> NDArray[np.int32]:
        """Return the ids that follow each start, shape (starts, width)."""
        return self._read(starts.tolist(), width).astype(np.int32)

    def _read(self, starts: list[int], width: int) -> NDArray[Any]:
        size = self.dtype.itemsize
        try:
            read = b"".join([_read_range(self._descriptor, start * size, (start + width) * size) for start in starts])
        except OSError as error:
            raise self._unreadable(error) from None
        self._check()
        ids = np.frombuffer(read, self.dtype)
        # The file may have been altered and restored between reading and the check.
        if len(ids) != len(starts) * width or int(ids.max(initial=0)) >= self._vocab_size:
            raise self._altered()
        return ids.reshape(len(starts), width)

    def _check(self) -> None:
        try:
            if fingerprint(os.fstat(self._descriptor)) != self.contents.fingerprint:
                self.contents = inspect(self._descriptor, self.dtype)
        except OSError as error:
            raise self._unreadable(error) from None
        size = self.contents.fingerprint[0]
        if size != self._n_tokens * self.dtype.itemsize or self.contents.sha256 != self._sha256:
            raise self._altered()
        if self.contents.largest_id >= self._vocab_size:
            raise InputError(
                f"token file {self.path} holds id {self.contents.largest_id}, and the vocabulary has "
                f"{self._vocab_size} tokens; delete its folder and run the command again"
            )

    def _altered(self) -> InputError:
        return InputError(
            f"token file {self.path} does not hold the tokens that were written to it: it was changed or damaged; "
            "run the command again, which rebuilds it"
        )

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(
            f"cannot read token file {self.path}: {error.strerror or one_line(error)}; check the disk, run again"
        )


def inspect(descriptor: int, dtype: np.dtype[Any]) -> Contents:
    """Hash a file of ids and find the largest id, in one pass."""
    before = fingerprint(os.fstat(descriptor))
    digest, largest, offset = hashlib.sha256(), -1, 0
    while read := os.pread(descriptor, BYTES_AT_ONCE, offset):
        digest.update(read)
        whole = np.frombuffer(read, dtype, len(read) // dtype.itemsize)
        largest = max(largest, int(whole.max(initial=0)))
        offset += len(read)
    return Contents(digest.hexdigest(), largest, before)


def _read_range(descriptor: int, start: int, end: int) -> bytes:
    """Read a range of bytes; fewer if the file ends before."""
    if end - start <= BYTES_AT_ONCE:
        return os.pread(descriptor, end - start, start)
    parts = range(start, end, BYTES_AT_ONCE)
    return b"".join(os.pread(descriptor, min(BYTES_AT_ONCE, end - part), part) for part in parts)
