"""Sizes that nobody has are answered before anything is made, and wrong types in one line."""

import contextlib
import json
import shutil
import struct
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.published_models import edit_config, save, save_tokenizer

from mlx_moe.errors import InputError
from mlx_moe.hub.models import open_model, read_model
from mlx_moe.storage import checkpoint
from mlx_moe.storage.tensor_files import read_header

SECONDS = 2.0  # of a machine that does other things, too
SIZES = {
    "llama": (
        *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads"),
        *("intermediate_size", "head_dim", "max_position_embeddings"),
    ),
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size", "decoder_sparse_step"),
    "granitemoehybrid": ("shared_intermediate_size",),
    "gpt2": ("n_layer", "n_embd", "vocab_size", "n_head", "n_positions", "n_inner"),
}
HUGE = [10**9, 10**12 + 1, 10**15, 10**30, 1e30]
WRONG = ["3", [], [3], {}, {"a": 1}, None, True, -1, 0, 0.5, float("nan"), float("inf"), "x" * 5000, "\x1b[31m"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for name in SIZES:
        save(name, folder / name)
    save_tokenizer(folder / "llama")
    return folder


@pytest.fixture
def model(published, tmp_path):
    return shutil.copytree(published / "llama", tmp_path / "theirs")


def refusal(call, *arguments):
    began = time.perf_counter()
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert time.perf_counter() - began < SECONDS
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in SIZES.items() for key in keys])
def test_sizes_are_not_believed(name, key, published, tmp_path):
    folder = shutil.copytree(published / name, tmp_path / "theirs")
    for value in HUGE:
        edit_config(folder, **{key: value})
        if "position" in key and value == 10**9:  # below what a context may be, and no tensor shows it
            continue
        refusal(read_model, folder)


@pytest.mark.parametrize("command", ["import", "parity --model", "parity", "export", "upcycle", "generate"])
def test_every_command_answers_at_once(command, model, mlxmoe, tmp_path):
    edit_config(model, num_hidden_layers=10**9)
    out = [tmp_path / "out"] if command in ("import", "export", "upcycle") else []
    began = time.perf_counter()
    result = mlxmoe(*command.split(), model, *out)
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "num_hidden_layers = 1000000000" in result.err
    assert time.perf_counter() - began < 10  # with the import of a library
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("name", SIZES)
def test_wrong_types_of_every_key_are_one_line_or_the_same_model(name, published, tmp_path):
    folder = shutil.copytree(published / name, tmp_path / "theirs")
    good = json.loads((folder / "config.json").read_text())
    config, _ = read_model(folder)
    places = [(key,) for key in good] + [("rope_parameters", key) for key in good.get("rope_parameters") or ()]
    for place in places:
        for value in WRONG:
            changed = json.loads(json.dumps(good))
            inner = changed if len(place) == 1 else changed[place[0]]
            inner[place[-1]] = value
            (folder / "config.json").write_text(json.dumps(changed))
            with contextlib.suppress(InputError):
                assert read_model(folder)[0].n_layers == config.n_layers, (place, value)


def raw(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


HEADERS = {
    "huge shape": {"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}},
    "shape that overflows": {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
    "negative shape": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "negative offset": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
    "offsets reversed": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "offset beyond": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [2**63, 2**63 + 4]}},
    "overlap": {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
    "unknown dtype": {"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
    "shape of strings": {"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "a list": [],
    "a number": 3,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "nested": b"[" * 100_000,
    "no JSON": b"\xff\xfe{",
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers(name, tmp_path):
    assert "get it anew" in refusal(read_header, raw(tmp_path / "model.safetensors", HEADERS[name], b"\0" * 4))


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 8, b"\xff" * 100])
def test_headers_cut_short(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "get it anew" in refusal(read_header, tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int64, np.bool_])
def test_a_tied_head_of_another_dtype(dtype, published, tmp_path):
    folder = shutil.copytree(published / "llama", tmp_path / "theirs")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].astype(dtype)}, file, {"format": "pt"})
    edit_config(folder, tie_word_embeddings=True)
    assert "lm_head.weight" in refusal(read_model, folder)


@pytest.mark.parametrize("command", ["import", "parity --model", "parity", "export"])
def test_git_lfs_pointers(command, model, mlxmoe, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 538090408\n"
    (model / "model.safetensors").write_text(pointer)
    result = mlxmoe(*command.split(), model, *([tmp_path / "out"] if command in ("import", "export") else []))
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "git lfs pull" in result.err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_links_out_of_the_folder_are_not_followed(name, model, mlxmoe, tmp_path):
    (model / name).rename(tmp_path / "secret")
    (model / name).symlink_to(tmp_path / "secret")
    result = mlxmoe("import", model, tmp_path / "out")
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "outside its folder" in result.err
    assert not (tmp_path / "out").exists()


def test_links_into_the_cache_of_the_hub_are_followed(model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert open_model(snapshot).state.lineage == ("a/b",)


@pytest.mark.parametrize(
    "arguments",
    [
        ("upcycle", "--experts", 1_000_000_000),
        ("grow", "--d-model", 1_000_000_000),
        ("grow", "--n-layers", 1_000_000_000),
        ("grow", "--d-model", 1_000_000, "--n-layers", 9_000),
        ("grow", "--d-ff", 10**12),
        ("grow", "--d-model", 10**30),
        ("upcycle", "--seed", -1),
        ("upcycle", "--granularity", 10**9),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_transfers_to_sizes_that_nobody_has(arguments, model, mlxmoe, tmp_path):
    command, *options = arguments
    began = time.perf_counter()
    result = mlxmoe(command, model, tmp_path / "out", *options)
    assert time.perf_counter() - began < SECONDS + 3
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_two_writers_of_one_place(model, mlxmoe, tmp_path):
    """The second says so at once, before it opens the model."""
    from mlx_moe.storage.atomic import creating

    with creating(tmp_path / "out"):
        for command in ("import", "export", "upcycle", "grow"):
            result = mlxmoe(command, model, tmp_path / "out")
            assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
            assert "another process is writing" in result.err
    assert mlxmoe("import", model, tmp_path / "out").code == 0
    assert checkpoint.load(tmp_path / "out").config.n_layers == 2


def test_a_link_to_itself_is_said(model, mlxmoe):
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("config.json")
    result = mlxmoe("generate", model, "--backend", "torch")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "leads back to itself" in result.err


def test_an_index_beside_one_file_must_name_its_tensors(model, mlxmoe, tmp_path):
    index = {"weight_map": {"not.there": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    result = mlxmoe("import", model, tmp_path / "out")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "do not hold the same tensors" in result.err


def test_a_tokenizer_further_up_is_not_the_models(model, tmp_path):
    from mlx_moe.hub.models import open_model

    (model / "tokenizer.json").unlink(missing_ok=True)
    (tmp_path / "tokenizer").mkdir(exist_ok=True)
    assert open_model(model).tokenizer_folder is None
