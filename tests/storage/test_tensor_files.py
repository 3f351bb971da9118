"""Safetensors, written in pieces and read where they lie."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_moe.storage import tensor_files
from mlx_moe.storage.tensor_files import read_header, stored_weights, write_file

ARRAYS = {
    "matrix": np.arange(35, dtype=np.float32).reshape(5, 7),
    "scalar": np.array(3, np.float32),
    "view": np.arange(12, dtype=np.float32).reshape(3, 4).T,
}
SHAPES = {name: array.shape for name, array in ARRAYS.items()}


@pytest.mark.parametrize("piece", [4, 12, 20, 1 << 20])
def test_what_is_written_is_what_the_library_reads(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", piece)
    monkeypatch.setattr(tensor_files, "WRITE_BYTES", 8)
    file = tmp_path / "x.safetensors"
    digest = write_file(file, SHAPES, lambda name: [ARRAYS[name]])
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    for arrays in (load_file(file), stored_weights(read_header(file))):
        assert arrays.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], array, strict=True)


def test_blocks_follow_one_another(tmp_path):
    file = tmp_path / "x.safetensors"
    write_file(file, SHAPES, lambda name: np.split(ARRAYS[name], 5) if name == "matrix" else [ARRAYS[name]])
    np.testing.assert_array_equal(load_file(file)["matrix"], ARRAYS["matrix"])


def test_mapped_arrays_may_be_written_to_and_the_file_stays(tmp_path):
    file = tmp_path / "x.safetensors"
    write_file(file, SHAPES, lambda name: [ARRAYS[name]])
    weights = stored_weights(read_header(file))
    weights["matrix"][:] = 0
    np.testing.assert_array_equal(weights["matrix"], ARRAYS["matrix"])
    with pytest.raises(KeyError):
        weights["other"]


def test_a_header_of_odd_length(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * ((5 - len(header)) % 8)
    assert len(header) % 4 == 1
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + np.arange(3, dtype="<f4").tobytes())
    array = stored_weights(read_header(file))["x"]
    assert array.flags.aligned
    np.testing.assert_array_equal(array, [0, 1, 2])


def test_an_error_on_the_way_is_that_error(tmp_path):
    def blocks(name):
        yield ARRAYS[name]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_file(tmp_path / "x.safetensors", SHAPES, blocks)
