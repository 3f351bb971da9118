"""Tokenizers that somebody else made: whatever is wrong with one is one line, and nothing of Rust's on the terminal."""

import base64
import contextlib
import json
import os
import threading
import time

import pytest

from mlx_moe.data.panics import panics_reported
from mlx_moe.data.stories import stories
from mlx_moe.data.tokenizers import LONGEST_TOKEN, MOST_TOKENS, Tokenizer, make_tokenizer
from mlx_moe.errors import InputError

TEXT = [*stories(60)]
SECONDS = 5
GIVES_UP = {"(a+)+$": "a" * 40 + "b", "(?:a|aa)+$": "a" * 60 + "b", "(x+x+)+z": "x" * 40}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_tokenizer("bpe:400", lambda: iter(TEXT)).save(folder)
    return {name: (folder / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}


@pytest.fixture
def folder(saved, tmp_path):
    for name, text in saved.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def changed(folder, **parts):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return folder


def refusal(capfd, call, *arguments):
    began = time.perf_counter()
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert time.perf_counter() - began < SECONDS
    assert str(error.value).isprintable(), error.value
    assert len(str(error.value)) < 500
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""
    return str(error.value)


def split_by(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("pattern", GIVES_UP)
def test_a_pattern_that_gives_up(pattern, folder, capfd):
    loaded = Tokenizer.load(changed(folder, pre_tokenizer=split_by(pattern)))
    text = GIVES_UP[pattern]
    assert "retry-limit-in-match" in refusal(capfd, loaded.encode, text)
    assert str(folder) in refusal(capfd, loaded.encode_batch, [*TEXT[:20], text])
    assert loaded.encode("zzz")


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


BOMBS = {
    "normalizer": {"normalizer": {"type": "Sequence", "normalizers": [replace(" ", " " * 1000)] * 4}},
    "nested": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Sequence", "normalizers": [replace("e", "e" * 9)]}] * 9,
        }
    },
    "regular expression": {"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y" * 100_000}},
    "prepended": {"normalizer": {"type": "Prepend", "prepend": "a" * 1_000_000}},
    "bytes of bytes": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 30}},
    "decoder": {"decoder": {"type": "Sequence", "decoders": [replace("e", "e" * 100)] * 5}},
    "pre-tokenizers": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
            ]
            * 30,
        }
    },
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_text_is_not_multiplied(name, folder, capfd):
    assert "times as long; at most" in refusal(capfd, Tokenizer.load, changed(folder, **BOMBS[name]))


@pytest.mark.parametrize(
    "charsmap",
    ["AAAA", "/////w==", base64.b64encode(b"\xff" * 64).decode(), base64.b64encode(b"\4\0\0\0" + b"\xfe" * 4).decode()],
)
def test_a_junk_charsmap(charsmap, folder, capfd):
    """The library may take it for one; then a text is encoded, or refused."""
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    with contextlib.suppress(InputError):
        Tokenizer.load(changed(folder, normalizer=normalizer)).encode_batch(TEXT)
    assert capfd.readouterr().err == ""


def test_unigram_without_unknown(folder, capfd):
    vocabulary = [["<|endoftext|>", 0.0], ["a", -1.0], ["b", -2.0]]
    model = {"type": "Unigram", "unk_id": None, "vocab": vocabulary, "byte_fallback": False}
    loaded = Tokenizer.load(changed(folder, model=model, pre_tokenizer=None, added_tokens=[]))
    assert loaded.encode("ab") == [1, 2]
    assert "cannot encode" in refusal(capfd, loaded.encode, "xyz")


BAD_JSON = {
    "nothing": "",
    "not an object": "[]",
    "no model": "{}",
    "nested": "[" * 10_000,
    "digits": '{"version": ' + "9" * 5000 + "}",
    "surrogate": '{"version": "\\ud800"}',
    "no tokens": '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "negative id": '{"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}',
    "id that no array has": '{"model": {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "a"}}',
    "id too large": json.dumps({"model": {"type": "WordLevel", "vocab": {"a": MOST_TOKENS}, "unk_token": "a"}}),
    "long token": json.dumps(
        {"model": {"type": "WordLevel", "vocab": {"a" * (LONGEST_TOKEN + 1): 0}, "unk_token": "a"}}
    ),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_file_that_is_no_tokenizer(name, folder, capfd):
    (folder / "tokenizer.json").write_text(BAD_JSON[name])
    assert str(folder) in refusal(capfd, Tokenizer.load, folder)


@pytest.mark.parametrize(
    "config",
    [
        *('{"eos_token": 3}', '{"eos_token": ["e"]}', '{"eos_token": {"content": 3}}', '{"eos_token": true}'),
        *('{"eos_token": "\\ud800"}', '{"eos_token": ' + "[" * 10_000, '{"eos_token": ' + "9" * 5000 + "}"),
        *('{"eos_token": "' + "x" * 100_000 + '"}', '{"eos_token": "\\u001b[31m\\n"}', "[]", "3", '"x"', "{"),
        '{"eos_token": {"content": {"content": "e"}}}',
    ],
    ids=lambda config: config[:30],
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_wrong_end_of_text(name, config, folder, capfd):
    (folder / "tokenizer_config.json").unlink()
    (folder / name).write_text(config)
    assert name in refusal(capfd, Tokenizer.load, folder)


@pytest.mark.parametrize(
    "spec", ["a" * 300, "~nobody-of-that-name/x", "x\0y", "bpe:" + "9" * 5000, "/dev/null", "../.."]
)
def test_a_name_that_is_none(spec, capfd):
    refusal(capfd, make_tokenizer, spec, lambda: iter(TEXT))


def test_a_pipe_is_no_tokenizer(folder, capfd):
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    assert "tokenizer.json is no regular file" in refusal(capfd, Tokenizer.load, folder)


def test_half_a_surrogate_pair_is_refused(folder, capfd):
    assert "cannot encode" in refusal(capfd, Tokenizer.load(folder).encode, "a\ud800b")


def interrupted():
    with panics_reported("work", ""):
        os.write(2, b"interrupted")
        raise KeyboardInterrupt


def test_what_others_print_meanwhile_is_kept(capfd):
    """By several threads, nested, and after a panic, too."""

    def work(number):
        with panics_reported("work", ""), panics_reported("work", ""):
            os.write(2, f"{number} ".encode())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(capfd.readouterr().err.split()) == sorted(map(str, range(20)))
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    os.write(2, b", after")
    assert capfd.readouterr().err == "interrupted, after"


def test_padding_and_cutting_are_off_before_anything_is_encoded(folder, capfd):
    padding = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    began = time.perf_counter()
    loaded = Tokenizer.load(changed(folder, padding=padding, truncation=cut))
    assert time.perf_counter() - began < SECONDS
    assert loaded.decode(loaded.encode(TEXT[0])) == TEXT[0]
