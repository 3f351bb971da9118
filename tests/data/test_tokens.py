import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moe.config import DataConfig
from mlx_moe.data import tokenizers as tokenizers_module
from mlx_moe.data import tokens as tokens_module
from mlx_moe.data.stories import stories
from mlx_moe.data.tokens import batch, fixed_windows, prepare
from mlx_moe.errors import InputError

STORIES = DataConfig(source="stories", n_documents=150, tokenizer="bpe:300")
DRAW = {"seed": 0, "phase": 1, "step": 0, "batch_size": 4, "context_length": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(STORIES, tmp_path_factory.mktemp("cache"))


def split_documents(data):
    return [
        set(data.tokenizer.decode(tokens.tolist()).split("<|endoftext|>")[:-1])
        for tokens in (data.train[:], data.validation[:])
    ]


def write_text(path, documents):
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


def entries(cache):
    return sorted(path.name for path in cache.iterdir())


def test_every_document_is_there_once_and_whole(data):
    train, validation = split_documents(data)
    assert train | validation == set(stories(150))
    assert not train & validation
    assert len(train) + len(validation) == 150
    assert 1 <= len(validation) <= 20
    for tokens in (data.train[:], data.validation[:]):
        assert tokens[-1] == data.tokenizer.eot_id
        assert tokens.ndim == 1
        assert tokens.dtype == np.uint16
        with pytest.raises(ValueError, match="read-only"):
            tokens[0] = 0


def test_provenance_adds_up(data):
    facts = data.provenance
    assert facts["source"]["identity"].startswith("stories:")
    assert facts["tokenizer"] == {"spec": "bpe:300", "identity": data.tokenizer.identity, "vocab_size": 300}
    assert facts["train"]["bytes"] + facts["validation"]["bytes"] == sum(len(text.encode()) for text in stories(150))
    for name, tokens, documents in zip(
        ("train", "validation"), (data.train[:], data.validation[:]), split_documents(data), strict=True
    ):
        assert facts[name]["tokens"] == len(tokens)
        assert facts[name]["documents"] == len(documents) == (tokens == data.tokenizer.eot_id).sum()
        assert facts[name]["bytes"] == sum(len(text.encode()) for text in documents)
        assert facts[name]["sha256"] == hashlib.sha256(tokens.tobytes()).hexdigest()


def test_documents_keep_their_side_when_data_grows(data, tmp_path):
    larger = prepare(STORIES.model_copy(update={"n_documents": 300, "tokenizer": "char"}), tmp_path)
    for few, many in zip(split_documents(data), split_documents(larger), strict=True):
        assert few < many


def test_copies_of_a_document_fall_on_one_side(tmp_path):
    path = write_text(tmp_path / "a.txt", [f"story {i % 40}" for i in range(400)])
    config = DataConfig(source=str(path), tokenizer="char", validation_fraction=0.3)
    train, validation = split_documents(prepare(config, tmp_path))
    assert not train & validation


def test_wide_tokens_for_a_large_vocabulary(tmp_path, data):
    folder = tmp_path / "tokenizer"
    data.tokenizer.save(folder)
    model = json.loads((folder / "tokenizer.json").read_text())
    model["model"]["vocab"] |= {f"Ġfiller{i}": i for i in range(300, 2**16 + 1)}
    (folder / "tokenizer.json").write_text(json.dumps(model))
    wide = prepare(STORIES.model_copy(update={"tokenizer": str(folder)}), tmp_path / "cache")
    assert wide.train.dtype == np.uint32
    assert np.array_equal(wide.train, data.train)
    assert np.array_equal(wide.validation, data.validation)


def test_one_book_holds_out_its_last_tokens(tmp_path, shared_data):
    config = DataConfig(source=str(shared_data / "tinyshakespeare.txt"), tokenizer="char")
    book = prepare(config, tmp_path)
    text = (shared_data / "tinyshakespeare.txt").read_text()
    whole = np.concatenate([book.train, book.validation]).tolist()
    assert book.tokenizer.decode(whole) == text + "<|endoftext|>"
    assert len(book.validation) == round(0.05 * len(whole))
    assert book.provenance["split"] == "by token"
    assert book.provenance["train"]["bytes"] + book.provenance["validation"]["bytes"] == len(text.encode())


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("documents", [["a"], ["Only one story."], ["one", "two"]])
def test_neither_side_is_ever_empty(tmp_path, fraction, documents):
    path = write_text(tmp_path / "a.txt", documents)
    small = prepare(DataConfig(source=str(path), tokenizer="char", validation_fraction=fraction), tmp_path / "cache")
    assert len(small.train) >= 1
    assert len(small.validation) >= 1
    whole = small.tokenizer.decode([*small.train[:].tolist(), *small.validation[:].tolist()])
    assert sorted(part.strip() for part in whole.split("<|endoftext|>")) == sorted(["", *documents])


def test_long_documents_are_encoded_in_pieces(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(stories(40)) + "x" * 3000)
    monkeypatch.setattr(tokenizers_module, "CHARACTERS_PER_PIECE", 500)
    pieces = prepare(DataConfig(source=str(path), tokenizer="bpe:300"), tmp_path / "cache")
    ids = [*pieces.train[:].tolist(), *pieces.validation[:].tolist()]
    assert pieces.tokenizer.decode(ids) == path.read_text() + "<|endoftext|>"


def test_cache_is_found_again_and_keyed_by_what_matters(tmp_path, monkeypatch):
    first = prepare(STORIES, tmp_path)
    assert len(entries(tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "make_tokenizer", lambda *args: pytest.fail("built again"))
        again = prepare(STORIES.model_copy(update={"text_field": "body", "fit_vocabulary": False}), tmp_path)
    assert np.array_equal(first.train, again.train)
    assert again.provenance == first.provenance
    for change in ({"n_documents": 151}, {"tokenizer": "char"}, {"validation_fraction": 0.1}):
        prepare(STORIES.model_copy(update=change), tmp_path)
    assert len(entries(tmp_path)) == 4


def test_folder_of_a_tokenizer_is_known_by_its_contents(tmp_path, data):
    data.tokenizer.save(tmp_path / "a")
    data.tokenizer.save(tmp_path / "b")
    for name in ("a", "b"):
        prepare(STORIES.model_copy(update={"tokenizer": str(tmp_path / name)}), tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 1
    prepare(STORIES.model_copy(update={"tokenizer": "char"}), tmp_path / "other").tokenizer.save(tmp_path / "b")
    prepare(STORIES.model_copy(update={"tokenizer": str(tmp_path / "b")}), tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 2


def test_default_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path / "mine"))
    prepare(DataConfig(source="stories", n_documents=20, tokenizer="char"))
    monkeypatch.delenv("MLXMOE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare(DataConfig(source="stories", n_documents=20, tokenizer="char"))
    assert entries(tmp_path / "mine") == entries(tmp_path / ".cache" / "mlxmoe")


def test_interrupted_making_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "_describe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(STORIES, tmp_path)
    assert entries(tmp_path) == []
    prepare(STORIES, tmp_path)


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file.*Not a directory.*MLXMOE_CACHE"):
        prepare(STORIES, tmp_path / "file" / "cache")


def test_bad_data_leaves_no_entry(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"body": "not"}\n')
    with pytest.raises(InputError, match="line 2"):
        prepare(DataConfig(source=str(path), tokenizer="bpe:300"), tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_progress_is_told(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(tokens_module, "DOCUMENTS_PER_BATCH", 5)
    prepare(STORIES, tmp_path, lines.append)
    assert "150 embedded stories" in lines[0]
    assert [line.partition(",")[0] for line in lines[1:]] == [f"encoded {n} documents" for n in (50, 100, 150)]


def test_batch_is_a_pure_function_of_its_arguments(data):
    one = batch(data.train, **DRAW)
    assert one.shape == (4, 17)
    assert one.dtype == np.int32
    assert np.array_equal(one, batch(np.array(data.train), **DRAW))
    # Pinned: a run that is resumed elsewhere, years later, must see the same data.
    drawn = batch(np.arange(1000, dtype=np.uint16), **DRAW)
    assert drawn[:, 0].tolist() == PINNED_STARTS
    assert (np.diff(drawn) == 1).all()


PINNED_STARTS = [499, 799, 619, 366]


def test_no_two_draws_share_a_stream():
    tokens = np.arange(2**20, dtype=np.uint32)
    seen = set()
    steps = [0, 1, 2, 3, 255, 256, 65535, 65536, 2**24, 2**32, 2**40 - 1]
    for seed in (0, 1, 2**63, 2**64 - 1):
        for phase in (0, 1, 2, 3):
            for step in steps:
                draw = {"seed": seed, "phase": phase, "step": step}
                seen.add(batch(tokens, **draw, batch_size=4, context_length=1).tobytes())
    assert len(seen) == 4 * 4 * len(steps)


def test_windows_cover_all_positions_evenly():
    tokens = np.arange(20, dtype=np.uint16)
    starts = batch(tokens, **(DRAW | {"batch_size": 16_000, "context_length": 4}))[:, 0]
    counts = np.bincount(starts)
    assert len(counts) == 16
    assert 850 < counts.min() <= counts.max() < 1150


@given(st.integers(2, 400), st.integers(1, 30), st.integers(1, 60))
def test_fixed_windows(length, context_length, n):
    tokens = np.arange(length, dtype=np.uint16)
    if length < context_length + 1:
        with pytest.raises(InputError):
            fixed_windows(tokens, n, context_length)
        return
    windows = fixed_windows(tokens, n, context_length)
    assert windows.dtype == np.int32
    assert windows.shape == (min(n, length // (context_length + 1)), context_length + 1)
    assert len(np.unique(windows)) == windows.size
    assert (np.diff(windows, axis=1) == 1).all()
    assert windows[0, 0] == 0
    gaps = np.diff(windows[:, 0])
    if len(gaps):
        assert windows[-1, -1] == length - 1
        assert gaps.max() - gaps.min() <= 1


def test_too_few_tokens():
    tokens = np.arange(16, dtype=np.uint16)
    for draw in (lambda: batch(tokens, **DRAW), lambda: fixed_windows(tokens, 2, 16)):
        with pytest.raises(InputError, match=r"16 tokens .*context_length 16 \+ 1.*take more data"):
            draw()
    assert batch(np.arange(17, dtype=np.uint16), **DRAW).tolist() == [list(range(17))] * 4


def test_import_pulls_in_no_framework():
    heavy = "('torch', 'mlx', 'datasets', 'pyarrow', 'transformers', 'tokenizers', 'huggingface_hub')"
    code = f"import sys, mlx_moe.data.tokens; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
