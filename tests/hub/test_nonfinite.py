"""NaN and Inf in a model's weights are refused, by the tensor's name, where a command would pass them on."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_moe.errors import InputError
from mlx_moe.storage import checkpoint
from mlx_moe.storage.tensor_files import check_finite

BROKEN = "model.layers.1.mlp.up_proj.weight"
COMMANDS = {
    "import": ("import", "MODEL", "OUT"),
    "export": ("export", "MODEL", "OUT"),
    "upcycle": ("upcycle", "MODEL", "OUT", "--experts", 2),
    "upcycle, lossy": ("upcycle", "MODEL", "OUT", "--experts", 2, "--noise", 0.1, "--allow-lossy"),
    "grow": ("grow", "MODEL", "OUT", "--n-layers", 3),
    "parity": ("parity", "MODEL"),
    "parity --model": ("parity", "--model", "MODEL"),
}


@pytest.fixture(params=[np.nan, np.inf, -np.inf], ids=str)
def broken(request, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    tensors[BROKEN][3, 5] = request.param
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def run(mlxmoe, command, model, tmp_path):
    return mlxmoe(*({"MODEL": model, "OUT": tmp_path / "out"}.get(part, part) for part in COMMANDS[command]))


@pytest.mark.parametrize("command", COMMANDS)
def test_refused_by_name(command, broken, mlxmoe, tmp_path):
    result = run(mlxmoe, command, broken, tmp_path)
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1), result.err
    assert BROKEN.removeprefix("model.") in result.err
    assert "NaN or Inf (1 of 1,536 values)" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_asked_for_on_import_and_refused_afterwards(broken, mlxmoe, tmp_path):
    assert "--allow-nonfinite" in run(mlxmoe, "import", broken, tmp_path).err
    result = mlxmoe("import", broken, tmp_path / "ours", "--allow-nonfinite")
    assert result.code == 0, result.err
    weights = checkpoint.load(tmp_path / "ours").weights
    assert np.count_nonzero(~np.isfinite(weights[BROKEN.removeprefix("model.")])) == 1
    for command in ("export", "upcycle", "grow", "parity"):
        result = run(mlxmoe, command, tmp_path / "ours", tmp_path)
        assert (result.code, len(result.err.strip().splitlines())) == (2, 1), result.err
        assert BROKEN.removeprefix("model.") in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_generation_stops_in_one_line(temperature, backend, broken, mlxmoe):
    options = ("--prompt", "w1 w2", "--temperature", temperature, "--backend", backend)
    result = mlxmoe("generate", broken, "-n", 4, *options)
    assert result.code == 2
    assert (
        result.err == "error: the model's logits hold NaN or Inf, so its weights are damaged; take another checkpoint\n"
    )
    assert "Traceback" not in result.err


def test_a_prompt_that_is_no_utf8(llama, mlxmoe):
    result = mlxmoe("generate", llama, "--prompt", "w1 \udcff")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: --prompt holds bytes that are no UTF-8; give it text\n"


def test_what_is_finite_though_its_sum_is_not():
    large = np.full((4, 4), 3e38, np.float32)
    check_finite("large", large, None)
    check_finite("cancelling", large * np.array([1, -1, 1, -1], np.float32), None)
    large[1, 2] = np.nan
    with pytest.raises(InputError, match=r"large holds NaN or Inf .1 of 16"):
        check_finite("large", large, None)
    both = np.array([np.inf, -np.inf, 0], np.float32)
    with pytest.raises(InputError, match="2 of 3"):
        check_finite("both", both, None)
