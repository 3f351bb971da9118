"""Sources that are damaged, hostile, or change while they are read: text comes, or one line."""

import base64
import json
import os
import random
import resource
import socket
import string
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mlx_moe.config import DataConfig
from mlx_moe.data import sources
from mlx_moe.data.sources import open_source
from mlx_moe.data.tokens import prepare
from mlx_moe.errors import InputError
from mlx_moe.validation import validate

ALL = None


def read(path, **settings):
    """All documents of a source, or the one line that says why there are none."""
    try:
        config = validate(DataConfig, {"source": str(path), "n_documents": ALL} | settings)
        documents = list(open_source(config).documents())
    except InputError as error:
        said = str(error)
    else:
        for document in documents:
            document.encode()
        return documents
    assert said
    assert "\n" not in said
    assert len(said) < 1000 + 2 * len(str(path))
    return said


def refusal(path, **settings):
    said = read(path, **settings)
    assert isinstance(said, str), said[:3]
    return said


# What is no regular file


def make_fifo(path):
    os.mkfifo(path)


SPECIAL = {
    "FIFO": make_fifo,
    "link to zeros": lambda path: path.symlink_to("/dev/zero"),
    "link to random": lambda path: path.symlink_to("/dev/urandom"),
    "link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "link to a FIFO": lambda path: [os.mkfifo(path.with_name("fifo")), path.symlink_to(path.with_name("fifo"))],
    "link to itself": lambda path: path.symlink_to(path.name),
    "dangling link": lambda path: path.symlink_to("gone"),
}


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_read(tmp_path, kind, ending):
    path = tmp_path / f"x{ending}"
    SPECIAL[kind](path)
    assert "cannot read" in refusal(path)
    (tmp_path / "a.txt").write_text("fine")
    assert "cannot read" in refusal(tmp_path)  # in a folder, too


def test_sockets_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("x.txt")
        assert "no regular file" in refusal("x.txt")


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/stdin", "/proc/self/mem", "/dev", "/proc/self/fd/0"])
def test_places_of_the_system(name):
    refusal(name)


# Names


@pytest.mark.parametrize(
    "name", ["~nobody-at-all/x", "~nobody-at-all/x.txt", "a\0b.txt", "\0", "x" * 300, "y" * 300 + ".txt"]
)
def test_impossible_names(name):
    said = refusal(name)
    assert "\0" not in said


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/../../b", "\x1b[31m.txt", "caf\udce9.txt", "new\nline.txt", "%s{0}"]
)
def test_strange_names(tmp_path, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    refusal(name)


# Folders


def test_folders_that_lead_back_into_themselves_are_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("once")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "up.txt").symlink_to("..")
    assert read(tmp_path) == ["once"]


def test_a_folder_of_very_many_files_is_refused(tmp_path, monkeypatch):
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text("x")
        (tmp_path / f"{n}.png").write_text("x")
    assert len(read(tmp_path)) == 40
    monkeypatch.setattr(sources, "MOST_FILES", 39)
    assert "holds more than" in refusal(tmp_path)
    monkeypatch.setattr(sources, "MOST_FILES", 100)
    monkeypatch.setattr(sources, "MOST_ENTRIES", 79)
    assert "holds more than" in refusal(tmp_path)


def test_deep_folders(tmp_path):
    before = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1500):  # deeper than Python recurses
            os.mkdir("d")
            os.chdir("d")
        with open("a.txt", "w") as file:
            file.write("deep")
        assert read(tmp_path) == ["deep"]
    finally:
        os.chdir(before)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # pytest recurses, too


# Sizes


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_line_is_bounded(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    path = tmp_path / f"a{ending}"
    path.write_text('{"text": "fine"}\n' + '{"text": "' + "x" * 2000)
    assert f"a{ending} line 2 has more than 1,000 bytes" in refusal(path)


def test_a_line_of_200_mb(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "fine"}\n{"text": "')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "a.jsonl line 2 has more than 67,108,864 bytes" in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
def test_a_file_that_is_only_a_size(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.touch()
    os.truncate(path, 1 << 40)
    start = time.monotonic()
    assert "never written" in refusal(path)
    assert time.monotonic() - start < 2


def test_more_stories_than_can_be():
    assert "at most 10,000,000" in refusal("stories", n_documents=10**12)
    assert "n_documents" in refusal("stories", n_documents=10**300)


# JSONL


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "n": ' + "9" * 5000 + "}",
        '{"text": "a", "n": -' + "9" * 5000 + "}",
        '{"text": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"text": "a", "b": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"text": "\\ud800"}',
        '{"text": "\\udfff\\ud800"}',
        '{"text": "a\\ud83d"}',
        '{"text": "\x01"}',
        '{"text": "a"} {"text": "b"}',
        '{"text": "a"',
        '{text: "a"}',
        "{'text': 'a'}",
        '"text"',
        "null",
        "NaN",
        "1e999",
        '{"text": ["a"]}',
        '{"text": {"text": "a"}}',
        '{"text": true}',
        '{"Text": "a"}',
        "{}",
        '{"' + "k" * 5000 + '": "a"}',
        "{" + ",".join(f'"{n}": 1' for n in range(2000)) + "}",
        "{" + ",".join(f'"{n}": "x"' for n in range(2000)) + "}",
        '{"\\u001b[31m\\n": "x"}',
        "\0",
        "{\0}",
    ],
)
def test_a_bad_row_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    assert "a.jsonl line 2" in refusal(path)


ATOMS = [
    "null",
    "true",
    "-0",
    "1e400",
    '"a"',
    '"\\u0000"',
    '"\\ud800"',
    "9" * 5000,
    "[]",
    "{}",
    "\\",
    '"',
    "\xff",
    "é",
    "nan",
]


@pytest.mark.parametrize("seed", range(60))
def test_generated_json(tmp_path, seed):
    rng = random.Random(seed)

    def value(depth=0):
        if depth > 4 or rng.random() < 0.4:
            return rng.choice(ATOMS)
        inside = [value(depth + 1) for _ in range(rng.randrange(4))]
        if rng.random() < 0.5:
            return "[" + ",".join(inside) + "]"
        return "{" + ",".join(f'"{rng.choice(["text", "a", ""])}": {part}' for part in inside) + "}"

    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(f"{value()}\n" for _ in range(rng.randrange(1, 4))), encoding=rng.choice(["utf-8", "latin-1"])
    )
    read(path)


@pytest.mark.parametrize("seed", range(60))
def test_mutated_text(tmp_path, seed):
    rng = random.Random(seed)
    rows = [json.dumps({"text": "".join(rng.choices(string.printable + "éß東🙂", k=30)), "n": n}) for n in range(5)]
    content = bytearray("\n".join(rows).encode() if seed % 2 else b"one\n<|endoftext|>\ntwo \xc3\xa9\n" * 5)
    for _ in range(rng.randrange(1, 5)):
        position = rng.randrange(len(content))
        if rng.random() < 0.3:
            del content[position : position + rng.randrange(20)]
        else:
            content[position : position + 1] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 1, 4])))
    path = tmp_path / f"a.{'jsonl' if seed % 2 else 'txt'}"
    path.write_bytes(content)
    read(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-7", "cp1252", "shift-jis", "utf-8-sig"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_encodings(tmp_path, encoding, ending):
    path = tmp_path / f"a{ending}"
    text = (
        "über 東京"
        if "16" in encoding or "32" in encoding or "utf-8" in encoding
        else "ü"
        if encoding == "cp1252"
        else "東"
    )
    path.write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode(encoding))
    said = read(path)
    if encoding == "utf-8-sig":
        assert text in said[0]
    else:
        assert isinstance(said, str) or encoding in ("utf-16-le", "utf-7")


# Parquet


def write(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def repeated(value, rows):
    """A column of one value, which Arrow keeps once."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int32)), pyarrow.array([value]))


def compressed(path, length, n, **options):
    """Rows that are stored in full, and compress to nothing."""
    write(path, {"text": ["x" * length] * n}, use_dictionary=False, compression="zstd", **options)


BOMBS = {
    "24 GB": lambda path: write(path, {"text": repeated("x" * 80_000, 300_000)}, store_schema=False),
    "24 GB as Arrow's dictionary": lambda path: write(path, {"text": repeated("x" * 80_000, 300_000)}),
    "24 GB in 240 groups": lambda path: write(path, {"text": repeated("x" * 80_000, 300_000)}, row_group_size=1250),
    "short values": lambda path: write(path, {"text": repeated("ab", 4_000_000)}, store_schema=False),
    "empty values": lambda path: write(path, {"text": repeated("", 4_000_000)}, store_schema=False),
    "nulls": lambda path: write(path, {"text": pyarrow.nulls(4_000_000, pyarrow.string())}),
    "a long value": lambda path: compressed(path, 80_000_000, 1),
    "long values": lambda path: compressed(path, 1_000_000, 100),
    "a prefix": lambda path: compressed(path, 100_000, 2000, column_encoding={"text": "DELTA_BYTE_ARRAY"}),
}


def test_a_small_file_of_very_much_text_is_refused(tmp_path):
    for number, make in enumerate(BOMBS.values()):
        make(tmp_path / f"{number}.parquet")
        assert (tmp_path / f"{number}.parquet").stat().st_size < 3_000_000
    code = (
        "import resource, sys, time\n"
        "import pyarrow.parquet\n"
        "from mlx_moe.config import DataConfig\n"
        "from mlx_moe.data.sources import open_source\n"
        "from mlx_moe.errors import InputError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "for path in sys.argv[1:]:\n"
        "    start = time.process_time()\n"
        "    try:\n"
        "        n = sum(1 for _ in open_source(DataConfig(source=path, n_documents=None)).documents())\n"
        "    except InputError as error:\n"
        "        n = error\n"
        "    print(f'{time.process_time() - start:.1f}', n)\n"
    )
    files = sorted(map(str, tmp_path.iterdir()))
    command = [sys.executable, "-c", code, *files]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    lines = result.stdout.splitlines()
    assert len(lines) == len(BOMBS)
    for line in lines:
        seconds, said = line.split(maxsplit=1)
        assert "unpacks to more than 256 times as much text" in said
        assert float(seconds) < 10  # of computing: a busy machine takes longer


KINDS = ["string", "large_string", "string_view", "dictionary", "json"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_every_kind_is_read(tmp_path, kind):
    texts = [f'{{"n": {n % 700}}}' for n in range(2500)] + [None]
    column = pyarrow.array(texts)
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind == "json":
        column = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), column)
    else:
        column = column.cast(getattr(pyarrow, kind)())
    for options in ({}, {"use_dictionary": False}, {"row_group_size": 900}, {"data_page_version": "2.0"}):
        path = write(tmp_path / "a.parquet", {"n": range(2501), "text": column}, **options)
        assert read(path) == texts[:-1]
        assert read(path, n_documents=1500) == texts[:1500]


def test_text_that_repeats_itself_is_read(tmp_path):
    assert len(read(write(tmp_path / "a.parquet", {"text": repeated("x" * 1000, 20_000)}))) == 20_000
    texts = ["".join(random.Random(n).choices(string.ascii_letters, k=2000)) for n in range(500)] * 60
    for compression in ("zstd", "none"):
        path = write(tmp_path / "b.parquet", {"text": texts}, compression=compression, row_group_size=10_000)
        assert read(path) == texts


def test_columns_that_are_no_text(tmp_path):
    columns = {"n": [1], "bytes": [b"a"], "list": [["a"]], "struct": [{"a": "b"}], "a.b": ["dotted"], "text": ["fine"]}
    path = write(tmp_path / "a.parquet", columns)
    for name in ("n", "bytes", "list", "struct"):
        assert f"no text in field {name!r}; name one" in refusal(path, text_field=name)
    assert read(path, text_field="a.b") == ["dotted"]
    for name in ("gone", "struct.a", "\x1b[31m", "x" * 2000):
        assert "has no field" in refusal(path, text_field=name)
    path = write(tmp_path / "b.parquet", {f"column {n}": ["a"] for n in range(5000)})
    assert "and 4,990 more" in refusal(path)
    path = write(tmp_path / "c.parquet", {"messages": [[{"role": "user", "content": "a"}]]})
    assert "has no field 'text', nor text in any of 'messages'" in refusal(path)


def test_a_column_that_comes_twice(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "has 2 columns named 'text'; rename all but one" in refusal(tmp_path / "a.parquet")


def test_a_column_called_as_a_part_of_another(tmp_path):
    path = write(tmp_path / "a.parquet", {"a": [{"b": 1}], "a.b": ["text"]})
    assert "has 2 columns named 'a.b'; rename all but one" in refusal(path, text_field="a.b")


def test_names_of_files_stay_in_one_line(tmp_path):
    (tmp_path / "a\nb.txt").write_bytes(b"\xff")
    assert f"{tmp_path}/a\\nb.txt line 1 is not UTF-8" in refusal(tmp_path)


def test_a_folder_that_may_not_be_read_is_named(as_nobody):
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o755)
        (Path(top) / "a.txt").write_text("text")
        (Path(top) / "inner").mkdir(mode=0o700)
        (Path(top) / "inner").chmod(0)
        with as_nobody():
            assert f"cannot read {top}/inner: Permission denied" in refusal(top)


def test_text_that_is_not_utf8_is_named(tmp_path):
    values = [b"fine"] * 1500 + [b"caf\xe9"] + [b"fine"]
    column = pyarrow.array(values).view(pyarrow.string())
    for options in ({}, {"use_dictionary": False}):
        path = write(tmp_path / "a.parquet", {"text": column}, **options)
        assert "a.parquet row 1501: field 'text' is not UTF-8" in refusal(path)


def test_very_many_columns_are_refused_at_once(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(_parquet_of(_columns(300_000)))
    start = time.monotonic()
    assert "is not a whole Parquet file" in refusal(path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("depth", [50, 10_000, 300_000])
def test_deeply_nested_columns(tmp_path, depth):
    path = tmp_path / "a.parquet"
    path.write_bytes(_parquet_of([_column(b"a", 1)] * depth + [_column(b"text")]))
    refusal(path)


def _parquet_of(columns):
    """A file without rows, by hand, in Thrift's compact protocol."""
    n = len(columns) + 1
    roots = sum(1 for _ in columns) if columns[0] == _column(b"c0") else 1
    schema = b"".join([_column(b"schema", roots), *columns])
    metadata = b"\x15\x02\x19\xfc" + _varint(n) + schema + b"\x16\x00\x19\x0c\x00"
    return b"PAR1" + metadata + struct.pack("<I", len(metadata)) + b"PAR1"


def _columns(n):
    return [_column(b"c%d" % number) for number in range(n)]


def _column(name, children=None):
    named = b"\x18" + _varint(len(name)) + name
    if children is None:
        return b"\x15\x0c\x25\x02" + named + b"\x00"  # type 6, optional
    return b"\x35\x02" + named + b"\x15" + _varint(2 * children) + b"\x00"


def _varint(n):
    low = [(n >> shift) & 127 for shift in range(0, max(1, n.bit_length()), 7)]
    return bytes([part | 128 for part in low[:-1]] + low[-1:])


@pytest.fixture(scope="module")
def whole_files():
    columns = {"text": [f"story {n % 37} " * (n % 5 + 1) for n in range(120)], "n": range(120)}
    files = []
    for compression in ("none", "snappy", "zstd"):
        for options in (
            {},
            {"use_dictionary": False},
            {"data_page_version": "2.0"},
            {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY", "n": "PLAIN"}},
        ):
            stream = pyarrow.BufferOutputStream()
            write(stream, columns, compression=compression, row_group_size=50, **options)
            files.append(stream.getvalue().to_pybytes())
    return files


@pytest.mark.parametrize("seed", range(20))
def test_mutated_parquet(tmp_path, whole_files, seed):
    rng = random.Random(seed)
    path = tmp_path / "a.parquet"
    for _ in range(20):
        content = bytearray(rng.choice(whole_files))
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        for _ in range(rng.choice([1, 1, 2, 8])):
            position = rng.choice([rng.randrange(footer), rng.randrange(footer, len(content)), len(content) - 6])
            content[position] = rng.choice([0, 1, 127, 128, 255, content[position] ^ 1 << rng.randrange(8)])
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        start = time.monotonic()
        read(path)
        assert time.monotonic() - start < 5


# Files that change


class Changing:
    """Documents of a source, where something happens to the file after the first of them."""

    def __init__(self, path, change):
        self.path, self.change = path, change

    def read(self, **settings):
        source = open_source(validate(DataConfig, {"source": str(self.path), "n_documents": ALL} | settings))
        documents = source.documents()
        texts = [next(documents)]
        self.change(self.path)
        return [*texts, *documents]


def append(path):
    with path.open("a") as file:
        file.write('{"text": "more"}\n')


FILE_CHANGES = {
    "longer": append,
    "cut": lambda path: os.truncate(path, 100),
    "another": lambda path: [path.unlink(), path.write_text('{"text": "other"}\n')],
    "gone": lambda path: path.unlink(),
    "rewritten": lambda path: path.write_text(path.read_text().replace("0", "1")),
}


@pytest.mark.parametrize("n_documents", [None, 3])
@pytest.mark.parametrize("change", FILE_CHANGES)
def test_a_file_that_changes_while_it_is_read(tmp_path, change, n_documents):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "story {n}"}}\n' for n in range(10_000)))
    with pytest.raises(InputError, match=r"a\.jsonl.*(changed while it was read|is not valid JSON)") as caught:
        Changing(path, FILE_CHANGES[change]).read(n_documents=n_documents)
    assert "\n" not in str(caught.value)


def test_a_file_that_changes_before_its_documents_are_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    source = open_source(DataConfig(source=str(path)))
    path.write_text("afterwards")
    with pytest.raises(InputError, match="changed while it was read"):
        list(source.documents())


def test_a_file_that_is_only_touched_is_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    source = open_source(DataConfig(source=str(path)))
    path.chmod(0o600)
    os.link(path, tmp_path / "b")
    assert list(source.documents()) == ["text"]


def test_no_tokens_are_kept_of_text_that_changed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one story\n" * 100)

    def change(line):
        if line.startswith("reading"):
            append(path)

    with pytest.raises(InputError, match="changed while it was read"):
        prepare(DataConfig(source=str(path), tokenizer="char"), tmp_path / "cache", change)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_line_longer_than_a_tokenizer_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_PIECE", 100)
    for name, text in {"l.txt": "x" * 101, "l.jsonl": json.dumps({"text": "y\n" + "x" * 101})}.items():
        (tmp_path / name).write_text(text)
        assert "101 characters without a line end; at most 100" in refusal(tmp_path / name)
    (tmp_path / "l.jsonl").write_text(json.dumps({"text": "xxxx\n" * 100}))
    assert read(tmp_path / "l.jsonl") == ["xxxx\n" * 100]


def test_an_encrypted_column_is_refused(tmp_path):
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):
        def wrap_key(self, key, name):
            return base64.b64encode(key)

        def unwrap_key(self, key, name):
            return base64.b64decode(key)

    how = encryption.EncryptionConfiguration(footer_key="k", column_keys={"k": ["text"]}, plaintext_footer=True)
    factory = encryption.CryptoFactory(lambda config: Keys())
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
    table = pyarrow.table({"text": ["a story"] * 10})
    with pyarrow.parquet.ParquetWriter(tmp_path / "t.parquet", table.schema, encryption_properties=properties) as file:
        file.write_table(table)
    said = read_apart(tmp_path / "t.parquet")
    assert "Cannot decrypt" in said


def read_apart(path):
    """What a process says that reads a source: the library may abort."""
    code = (
        "import sys; from mlx_moe.config import DataConfig; from mlx_moe.data.sources import open_source\n"
        "from mlx_moe.validation import validate\n"
        "list(open_source(validate(DataConfig, {'source': sys.argv[1]})).documents())"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1, ended
    return ended.stderr.splitlines()[-1]
