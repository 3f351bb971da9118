"""Files made wrong, one way or another: in their bytes, or in what these mean. All is drawn from a given generator."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Tree = Any
Place = tuple[Any, ...]


class Raw(str):
    """Stands for itself in the text that is written, whether it is valid there or not."""


DELETED = object()
EVIL_NAME = "mlxmoe-fuzz-evil"
NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 10**300, -(2**63)),
    *(0.0, -0.0, 0.5, 1.5, 1e-320, 1e-9, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *(
        "",
        " ",
        "x",
        "0",
        "1",
        "-1",
        "nan",
        "true",
        "null",
        "x" * 300,
        "x" * 100_000,
        "a\nb",
        "\x00",
        "a\x00b",
        "\ud800",
    ),
    *("\x1b[31mred", "\x1b]0;title\x07", "[/b]", "[red]x", "\u202e", "\u2028", "%s%n", "{x}", "$(id)", "<script>", "é"),
    *(
        "..",
        ".",
        "/",
        "~",
        "~nobody-such/x",
        f"../../{EVIL_NAME}",
        f"/tmp/{EVIL_NAME}",
        "fifo",
        "circle",
        "zero",
        "a/b",
    ),
    *(
        "/dev/null",
        "auto",
        "none",
        "silu",
        "char",
        "stories",
        "float16",
        "F32",
        "BF16",
        "I64",
        "<|endoftext|>",
        "\ufeff",
    ),
)
SHAPES: tuple[Tree, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [1.0, [2.0]],
    {"a": {"b": []}},
    [0] * 10_000,
)
JSON_RAWS = tuple(
    map(Raw, ("9" * 5_000, "-" + "9" * 5_000, "1e999", "1E-999", "01", "tru", "", "'x'", '{"a":1,"a":2}', '"\\ud800"'))
) + (Raw("[" * 100 + "]" * 100), Raw("[" * 100_000 + "]" * 100_000), Raw('{"a":' * 100_000), Raw("1" + "0" * 308))
YAML_RAWS = tuple(
    map(
        Raw,
        (
            *(
                "!!timestamp x",
                "2024-13-01",
                "2024-01-01",
                '!!int ""',
                "!!float abc",
                "!!bool maybe",
                "!!binary x",
                "~",
            ),
            *("!!python/object/apply:os.system [id]", "&a [*a]", "*none", "!!set {a}", "!!omap [a]", "1:30:99", "0o17"),
            *(
                ".inf",
                ".nan",
                "0x1F",
                "1_000",
                "yes",
                "&b [*b, *b]",
                "!x y",
                "? a",
                "<<: 1",
                "|",
                ">",
                "@x",
                "`x",
                "%x",
            ),
            *("0b2", "1e3", "1.e3", "+1", "!!null x", "!!str", "{<<: [1]}", "{<<: {a: 1}}", "{? [a] : b}", "[" * 1000),
        ),
    )
)


def mutate_file(path: Path, random: Random) -> None:
    """Change a file in one of the ways that suit it; rarely it is emptied, or becomes what is no regular file."""
    if random.random() < 0.04:
        path.unlink()
        random.choice(
            [path.mkdir, path.touch, lambda: path.symlink_to("circle"), lambda: path.symlink_to("/dev/zero")]
        )()
        return
    data = path.read_bytes()
    change = BY_ENDING.get(path.suffix, mutate_bytes)
    if change is not mutate_bytes and random.random() < 0.15:
        change = mutate_bytes
    path.write_bytes(change(data, random))


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Cut, double, overwrite or insert somewhere, once or a few times."""
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        start = random.randrange(len(data) + 1)
        end = min(len(data), start + random.choice((1, 1, 2, 8, 100, 10_000)))
        junk = random.choice(
            (b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"{", b'"', b"\0" * 1000, b"\x1b[2J")
        )
        data = random.choice(
            (
                lambda d, s, e, j: d[:s],
                lambda d, s, e, j: d[:s] + d[e:],
                lambda d, s, e, j: d[:e] + d[s:],
                lambda d, s, e, j: d[:s] + j + d[s:],
                lambda d, s, e, j: d[:s] + j + d[s + len(j) :],
                lambda d, s, e, j: (
                    d[:s] + bytes(byte ^ 1 << random.randrange(8) for byte in d[s:e][:8]) + d[s:][len(d[s:e][:8]) :]
                ),
            )
        )(data, start, end, junk)
    return data


def mutate_json(data: bytes, random: Random) -> bytes:
    return to_text(mutate_tree(json.loads(data), random, JSON_RAWS)).encode("utf-8", "surrogatepass")


def mutate_yaml(data: bytes, random: Random) -> bytes:
    """Change a YAML text in what it means; written in its flow style, which is JSON's but for the values that are not."""
    import yaml

    return to_text(mutate_tree(yaml.safe_load(data), random, YAML_RAWS)).encode("utf-8", "surrogatepass")


def mutate_lines(data: bytes, random: Random) -> bytes:
    """Change one line of JSON, or the order or number of lines."""
    lines = data.splitlines(keepends=True)
    at = random.randrange(len(lines))
    if random.random() < 0.7:
        lines[at] = mutate_json(lines[at], random) + b"\n"
    else:
        whole = random.choice((b"\n", b"\0\n", b"[]\n", b"null\n", b"{}\n", lines[at][:-9], lines[at] * 3, b"\xff\n"))
        lines[at : at + random.choice((0, 1))] = [whole]
    return b"".join(lines)


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Change the header in what it means, its length, or some values."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = random.randrange(4)
    if kind <= 1:
        header = mutate_json(header, random)
        stated = (
            len(header)
            if kind == 0
            else random.choice((0, 1, len(header) - 1, len(header) + 1, 2**40, 2**63, 2**64 - 1))
        )
        return stated.to_bytes(8, "little") + header + body
    if kind == 2 and len(body) >= 4:
        at = 4 * random.randrange(len(body) // 4)
        value = random.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e-40, 0.0))
        count = random.choice((1, 1, 100))
        values = struct.pack("<f", value) * count
        return data[:8] + header + body[:at] + values[: len(body) - at] + body[at + len(values) :]
    return data[:8] + header + random.choice((body[:-4], body + b"\0" * 4, b"", body * 2))


def mutate_parquet(data: bytes, random: Random) -> bytes:
    """Write another table, whose columns may be of any type; the given one is not looked at."""
    import pyarrow as pa
    import pyarrow.parquet

    texts = ["Once upon a time there was a dog. " * 20] * 50
    column = random.choice(
        (
            lambda: pa.array(texts),
            lambda: pa.array(texts, pa.large_string()),
            lambda: pa.array(texts, pa.string_view()),
            lambda: pa.array(texts).dictionary_encode(),
            lambda: pa.array([None] * 50, pa.string()),
            lambda: pa.array([], pa.string()),
            lambda: pa.array([1] * 50),
            lambda: pa.array([b"\xff\xfe"] * 50),
            lambda: pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers()),
            lambda: pa.array([["a", "b"]] * 50),
            lambda: pa.array([{"text": "a"}] * 50),
            lambda: pa.nulls(50),
            lambda: pa.array([True] * 50),
            lambda: pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 1_000_000])),
            lambda: pa.array(["x" * 30_000_000]),
        )
    )()
    name = random.choice(("text", "text", "text", "Text", "story", "", "te\x1b[31mxt"))
    stream = io.BytesIO()
    kind = random.choice(("snappy", "zstd", "none"))
    pyarrow.parquet.write_table(pa.table({name: column}), stream, compression=kind)
    return mutate_bytes(stream.getvalue(), random) if random.random() < 0.3 else stream.getvalue()


BY_ENDING: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": mutate_json,
    ".jsonl": mutate_lines,
    ".yaml": mutate_yaml,
    ".safetensors": mutate_safetensors,
    ".parquet": mutate_parquet,
}


def mutate_tree(tree: Tree, random: Random, raws: tuple[Raw, ...]) -> Tree:
    """Values replaced, left out, added, moved or named otherwise, once or a few times."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        place = random.choice(list(places(tree)))
        tree = replace_at(tree, place, another_value(value_at(tree, place), random, raws), random)
    return tree


def another_value(value: Tree, random: Random, raws: tuple[Raw, ...]) -> Tree:
    """What takes the place of a value: like it and a little off, or nothing that belongs there."""
    if random.random() < 0.3:
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return random.choice(
                (-value, value + 1, value - 1, value * 10**9, value * 2, str(value), [value], value / 3)
            )
        if isinstance(value, str):
            return random.choice((value.upper(), value + " ", value[:-1], [value], {value: value}, value[:1000] * 1000))
        if isinstance(value, list):
            return random.choice((value[1:], value + value, value[::-1], [value], [], dict(enumerate(map(str, value)))))
        if isinstance(value, dict):
            return random.choice((list(value.items()), list(value), {}, {**value, "unknown": 1}))
    return random.choice((DELETED, *[random.choice(kind) for kind in (NUMBERS, NUMBERS, TEXTS, TEXTS, SHAPES, raws)]))


def places(tree: Tree, before: Place = ()) -> Iterator[Place]:
    yield before
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree[:50]) if isinstance(tree, list) else ()
    for key, value in entries:
        yield from places(value, (*before, key))


def value_at(tree: Tree, place: Place) -> Tree:
    for key in place:
        tree = tree[key]
    return tree


def replace_at(tree: Tree, place: Place, value: Tree, random: Random) -> Tree:
    """A copy with another value in a place, or, rarely, with the value under another key."""
    if not place:
        return None if value is DELETED else value
    copy, key = dict(tree) if isinstance(tree, dict) else list(tree), place[0]
    if len(place) > 1:
        copy[key] = replace_at(copy[key], place[1:], value, random)
    elif value is DELETED:
        del copy[key]
    elif isinstance(copy, dict) and random.random() < 0.1:
        copy[random.choice(TEXTS)] = copy.pop(key)
    else:
        copy[key] = value
    return copy


def to_text(tree: Tree) -> str:
    """JSON, but for what stands for itself."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {to_text(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list | tuple):
        return "[" + ", ".join(map(to_text, tree)) + "]"
    return json.dumps(tree)
