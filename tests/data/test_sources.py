import json
import os
import re
import sys
import types

import pytest

from mlx_moe.config import DataConfig
from mlx_moe.data.sources import open_source
from mlx_moe.data.stories import story
from mlx_moe.errors import InputError
from mlx_moe.validation import validate


def documents(path, **settings):
    return list(open_source(validate(DataConfig, {"source": str(path)} | settings)).documents())


def identity(path, **settings):
    return open_source(validate(DataConfig, {"source": str(path)} | settings)).identity


def refusal(path, **settings):
    with pytest.raises(InputError) as caught:
        documents(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_stories():
    source = open_source(DataConfig(source="stories", n_documents=20))
    assert list(source.documents()) == list(source.documents()) == [story(i) for i in range(20)]
    assert open_source(DataConfig(source="stories", n_documents=None)).identity == identity(
        "stories", n_documents=10_000
    )
    assert source.identity != identity("stories", n_documents=21)


def test_text_without_separator_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwö\n".encode())
    assert documents(path) == ["one\n\ntwö\n"]


def test_text_splits_at_lines_of_end_of_text_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\nstill <|endoftext|> one\n<|endoftext|>\n \n<|endoftext|>\r\n\ntwo\n<|endoftext|>\n")
    assert documents(path) == ["one\nstill <|endoftext|> one\n", "\ntwo\n"]
    assert documents(path, n_documents=1) == ["one\nstill <|endoftext|> one\n"]


def test_jsonl(tmp_path):
    rows = [{"text": "a\nb", "body": "x"}, {"text": None, "body": "y"}, {"text": " ", "body": ""}, {"text": "ü"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text() + "\n\n")
    assert documents(path) == ["a\nb", "ü"]
    assert documents(path, text_field="body", n_documents=2) == ["x", "y"]


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"n": list(range(2500)), "text": [f"story {i}" for i in range(2500)]})
    assert documents(path) == [f"story {i}" for i in range(2500)]
    hint = "name one that holds text with -o data.text_field=NAME (of eval: --text-field NAME), here 'text'"
    assert f"has no text in field 'n'; {hint}" in refusal(path, text_field="n")
    assert f"has no field 'body'; {hint}" in refusal(path, text_field="body")


@pytest.mark.parametrize("damage", ["cut", "pages"])
def test_damaged_parquet(tmp_path, damage):
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"story {i}" for i in range(5000)]})
    content = path.read_bytes()
    path.write_bytes(content[:500] if damage == "cut" else content[:4] + bytes(len(content) - 2004) + content[-2000:])
    assert "a.parquet" in refusal(path)


def test_folder_is_read_recursively_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.TXT").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    write_jsonl(tmp_path / "a2.jsonl", [{"text": "second"}])
    write_parquet(tmp_path / "c.parquet", {"text": ["fourth"]})
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "._a.txt").write_bytes(b"\xff\x00")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.txt").write_text("hidden")
    assert documents(tmp_path) == ["first", "second", "third", "fourth"]


def test_real_text(shared_data):
    sample = documents(shared_data / "tinystories-sample.jsonl", n_documents=None)
    assert len(sample) > 1000
    assert sample[0].startswith("One day, a little girl named Lily")
    (book,) = documents(shared_data / "tinyshakespeare.txt")
    assert len(book) == 1_115_394


def test_identity_changes_exactly_with_the_text(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write_jsonl(one, [{"text": "a", "body": "b"}])
    two.write_bytes(one.read_bytes())
    assert identity(one) == identity(two) == identity(one, tokenizer="char", validation_fraction=0.3)
    assert len({identity(one), identity(one, text_field="body"), identity(one, n_documents=1)}) == 3
    write_jsonl(two, [{"text": "a", "body": "c"}])
    assert identity(one) != identity(two)
    text = tmp_path / "a.txt"
    text.write_bytes(one.read_bytes())
    assert identity(text) == identity(text, text_field="body") != identity(one)


@pytest.mark.parametrize("name", ["storys", "storis", "Stories", "tinystory", "TinyStories", "roneneldan/TinyStories"])
def test_misspelt_builtin(name):
    assert f"did you mean {'tinystories' if 'iny' in name else 'stories'!r}?" in refusal(name)


def test_missing_path(tmp_path):
    message = refusal(tmp_path / "corpus.txt")
    assert "corpus.txt" in message
    assert "did you mean" not in message
    assert ".parquet" in message


def test_impossible_path():
    assert "File name too long" in refusal("x" * 3000)


def test_unknown_ending(tmp_path):
    for name in ("a.csv", "noending"):
        (tmp_path / name).write_text("x")
        assert ".jsonl or .parquet" in refusal(tmp_path / name)


def test_folder_without_data(tmp_path):
    (tmp_path / "a.md").write_text("x")
    assert "holds no .txt, .jsonl or .parquet" in refusal(tmp_path)


@pytest.mark.parametrize("line", ["{'text': 1}", '{"text": "a"', "nonsense", "[" * 100_000])
def test_bad_json_names_the_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    assert re.search("a.jsonl line 3 is not valid JSON: .*; every line must be one JSON object", refusal(path))


def test_json_that_is_no_object_or_no_text(tmp_path):
    assert "line 1 holds list" in refusal(write_jsonl(tmp_path / "a.jsonl", [["text"]]))
    assert "holds int, not text" in refusal(write_jsonl(tmp_path / "b.jsonl", [{"text": 3}]))
    assert "Unicode" in refusal(write_jsonl(tmp_path / "c.jsonl", [{"text": "\ud800"}]))


def test_missing_field_names_those_there_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"story": "b", "id": 3}])
    message = refusal(path)
    assert "line 2 has no field 'text'" in message
    assert "-o data.text_field=NAME (of eval: --text-field NAME), here 'story'" in message
    message = refusal(write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user"}]}]))
    assert "has no field 'text', nor text in any of 'messages'" in message


@pytest.mark.parametrize("content", [b"fine\n\xe9t\xe9\n", "fine\nété\n".encode("utf-16")])
def test_not_utf8(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    message = refusal(path)
    assert "is not UTF-8" in message
    assert f"line {2 if content.startswith(b'fine') else 1} " in message


@pytest.mark.parametrize("content", ["", "\n \n", "<|endoftext|>\n<|endoftext|>\n"])
def test_no_text(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_text(content)
    assert "every document in it is blank" in refusal(path)


def test_dangling_link_in_a_folder_is_not_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("here")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    assert "cannot read" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "a.txt"
    path.write_text("x")
    path.chmod(0)
    assert "Permission denied" in refusal(path)
    folder.chmod(0)
    assert "Permission denied" in refusal(path)
    folder.chmod(0o700)


def fake_hub(monkeypatch, rows, reachable=True):
    def dataset_info(self, name, timeout):
        assert timeout <= 10
        if not reachable:
            raise ConnectionError("Name or service\nnot known")

    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("roneneldan/TinyStories", "train", True)
        return rows()

    hub = types.SimpleNamespace(HfApi=type("HfApi", (), {"dataset_info": dataset_info}))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_tinystories(monkeypatch):
    def rows():
        for text in ("one", " ", "two", "three"):
            yield {"text": text}
        raise AssertionError("read further than asked")

    fake_hub(monkeypatch, rows)
    assert documents("tinystories", n_documents=3) == ["one", "two", "three"]
    assert identity("tinystories", n_documents=3) != identity("tinystories", n_documents=None)


def test_tinystories_out_of_reach_names_two_ways_out(monkeypatch):
    fake_hub(monkeypatch, list, reachable=False)
    source = open_source(DataConfig(source="tinystories"))
    with pytest.raises(InputError, match=r"service not known.*--data stories.*--data FILE"):
        next(source.documents())


def test_tinystories_breaking_off(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise OSError("connection reset")

    fake_hub(monkeypatch, rows)
    assert "connection reset" in refusal("tinystories")
