"""Text columns of Parquet files, within bounds: a few bytes of a file can expand to any amount of text.

A dictionary value is repeated by a few bits, a prefix (DELTA_BYTE_ARRAY) by a number, and zeros compress to almost
nothing. So each row group's size is bounded before it is read: by its metadata and the longest value in its dictionary,
and if that could be too much, by counting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_moe.errors import InputError, one_line
from mlx_moe.extras import require
from mlx_moe.storage.regular_files import open_regular

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

ROWS_AT_ONCE, BYTES_AT_ONCE = 1000, 64 << 20
BYTES_READ_AT_ONCE = 1 << 20
# Limit of the unpacked size: this many bytes, and beyond that so many times the compressed size. Text compresses 3 to
# 20 times.
UNPACKED_ANYHOW, UNPACKED_TIMES = 64 << 20, 256
BYTES_OF_A_ROW = 32  # added per row to its text: empty rows take time too
LONGEST_LIST = 100_000  # columns, or row groups


@contextlib.contextmanager
def opened(path: Path) -> Iterator[ParquetFile]:
    """Open a file for reading. Raises InputError if it is damaged, at once or while it is read, and OSError."""
    require("pyarrow", "a Parquet file")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with open(open_regular(path), "rb") as stream:
            yield ParquetFile(stream, thrift_container_size_limit=LONGEST_LIST)
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _damaged(path, one_line(error)) from None


def text_columns(file: ParquetFile) -> list[str]:
    """Return the names of the columns that hold text, in order."""
    import pyarrow

    def is_text(kind: Any) -> bool:
        kind = getattr(kind, "storage_type", kind)
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        return kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null())

    return [name for name, kind in zip(file.schema_arrow.names, file.schema_arrow.types, strict=True) if is_text(kind)]


def values(path: Path, file: ParquetFile, name: str) -> Iterator[str | None]:
    """Yield the values of a text column, in order. Raises InputError if it expands too far or is not UTF-8."""
    schema = file.metadata.schema
    columns = [schema.column(i).path for i in range(file.metadata.num_columns)]
    if (n := columns.count(name)) > 1:
        raise InputError(f"{path} has {n} columns named {name!r}; rename all but one")
    column = columns.index(name)
    size, packed, spare, row = path.stat().st_size, 0, UNPACKED_ANYHOW, 0
    if file.num_row_groups:  # fail here on an encrypted column: pyarrow aborts when its metadata are accessed
        next(_batches(file, 0, name, 1), None)
    for group in range(file.num_row_groups):
        chunk = file.metadata.row_group(group).column(column)
        packed += chunk.total_compressed_size
        if packed > size:
            raise _damaged(path, "its row groups overlap")
        allowed = UNPACKED_TIMES * chunk.total_compressed_size
        repeated = _longest_repeated(path, file, group, column, name)
        rows_at_once = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // max(1, repeated)))
        if chunk.total_uncompressed_size + chunk.num_values * (repeated + BYTES_OF_A_ROW) > allowed:
            counted = max(chunk.total_uncompressed_size, chunk.num_values * BYTES_OF_A_ROW)  # a lower bound
            if counted <= allowed + spare:
                counted = _count(file, group, name, BYTES_AT_ONCE // max(BYTES_OF_A_ROW, repeated), allowed + spare)
            spare -= max(0, counted - allowed)
            if spare < 0:
                raise InputError(
                    f"{path} has {size:,} bytes and unpacks to more than {UNPACKED_TIMES} times as much text, "
                    "as a file does that is damaged or made to fill memory; if it is meant to, write its text as JSONL"
                )
        for batch in _batches(file, group, name, rows_at_once):
            for value in batch:
                row += 1
                try:
                    yield value.as_py()
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{path} row {row}: field {name!r} is not UTF-8 ({error.reason}); fix or drop the row"
                    ) from None


def _longest_repeated(path: Path, file: ParquetFile, group: int, column: int, name: str) -> int:
    """Return an upper bound (bytes) of the longest value that can be repeated for free; 0 if there is none."""
    import pyarrow
    from pyarrow import compute
    from pyarrow.parquet import ParquetFile

    chunk = file.metadata.row_group(group).column(column)
    if "DELTA_BYTE_ARRAY" in chunk.encodings:
        return int(chunk.total_uncompressed_size)
    if not chunk.has_dictionary_page:
        return 0
    with open(open_regular(path), "rb") as stream:
        coded = ParquetFile(stream, metadata=file.metadata, read_dictionary=[name], buffer_size=BYTES_READ_AT_ONCE)
        first = next(_batches(coded, group, name, 1), None)  # the first row loads the dictionary
        if isinstance(first, pyarrow.DictionaryArray):
            return compute.max(compute.binary_length(first.dictionary)).as_py() or 0
    return 0


def _count(file: ParquetFile, group: int, name: str, rows_at_once: int, limit: int) -> int:
    """Count the bytes of a row group, stopping once the limit is exceeded."""
    import pyarrow
    from pyarrow import compute

    counted = 0
    for batch in _batches(file, group, name, max(1, rows_at_once)):
        decoded = batch.dictionary_decode() if isinstance(batch, pyarrow.DictionaryArray) else batch
        lengths = compute.binary_length(decoded.cast(pyarrow.large_string()))
        counted += (compute.sum(lengths).as_py() or 0) + len(batch) * BYTES_OF_A_ROW
        if counted > limit:
            break
    return counted


def _batches(file: ParquetFile, group: int, name: str, rows_at_once: int) -> Iterator[Any]:
    """Yield a column of a row group as Arrow arrays."""
    for batch in file.iter_batches(rows_at_once, row_groups=[group], columns=[name], use_threads=False):
        array = batch.column(0)
        yield getattr(array, "storage", array)


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not a whole Parquet file ({why}); write it anew")
