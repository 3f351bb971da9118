"""The rules of this project that a machine can check: who imports whom, how long files are, what is read back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mlx_moe", "torch_ref", "parity")
FILES = [Path("cli.py"), *sorted(path.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
MIRRORED = sorted(path.name for path in (ROOT / "torch_ref").glob("*.py"))


def module_name(file):
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def imports(file):
    """The full names of all that a file imports anywhere, also inside functions and for type checkers."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def is_below(name, package):
    return name == package or name.startswith(f"{package}.")


def in_new_python(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_down(file):
    forbidden = {
        "mlx_moe/model": ["torch", "torch_ref", "parity", "cli"],
        "mlx_moe": ["torch", "mlx", "torch_ref", "mlx_moe.model", "parity", "cli"],
        "torch_ref": ["mlx", "mlx_moe.model", "parity", "cli"],
        "parity/libraries": ["cli"],
        "parity": ["torch", "mlx", "cli"],
        "cli.py": ["torch", "mlx"],
    }
    place = next(place for place in forbidden if file.is_relative_to(place))
    wrong = {name for name in imports(file) for package in forbidden[place] if is_below(name, package)}
    assert not wrong


def test_the_floor_loads_no_framework():
    floor = sorted(module_name(file) for file in FILES if file.is_relative_to("mlx_moe") and "model" not in file.parts)
    for part in ("config", "accounting", "parameters", "data", "transfer", "training"):
        assert any(is_below(name, f"mlx_moe.{part}") for name in floor)
    heavy = ("torch", "mlx", "transformers", "datasets", "mlx_lm")
    code = f"import sys, {', '.join(floor)}; print(*(name for name in {heavy} if name in sys.modules))"
    assert in_new_python(code).split() == []


@pytest.mark.parametrize(("name", "blocked"), [("torch", "mlx"), ("mlx", "torch")])
def test_each_backend_works_without_the_other(name, blocked):
    code = f"""
import sys
sys.modules[{blocked!r}] = None
import numpy as np
from mlx_moe.config import ModelConfig, MoEConfig, OptimizerConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import initialize
from mlx_moe.training.backend import choose_backend
assert choose_backend().name == {name!r}
config = ModelConfig(vocab_size=16, context_length=8, d_model=16, n_layers=1, n_heads=2, moe=MoEConfig(n_experts=4))
trainer = choose_backend({name!r}).trainer(config, initialize(config, 0), OptimizerConfig(), "cpu")
print(trainer.step(np.zeros((2, 9), np.int32), 1e-3, 0)().loss)
try:
    choose_backend({blocked!r})
except InputError:
    print("refused")
"""
    loss, refused = in_new_python(code).split()
    assert 1 < float(loss) < 5
    assert refused == "refused"


@pytest.mark.parametrize("file", MIRRORED)
def test_the_backends_mirror_each_other(file):
    one, other = ROOT / "torch_ref" / file, ROOT / "mlx_moe" / "model" / file
    assert other.is_file()
    names = [
        {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
        for path in (one, other)
    ]
    public = [{name for name in side if not name.startswith("_")} for side in names]
    assert public[0] - {"MultiOptimizer", "RuledParameter"} == public[1]  # MLX brings the first


def test_no_file_is_a_drawer_for_everything():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [file for file in FILES if drawers & {file.stem, *file.parts}] == []


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_that_can_run_code_is_read_back(file):
    pickles = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    assert not pickles & {name.partition(".")[0] for name in imports(file)}
    calls = [
        ast.unparse(node.func)
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    readers = {"torch.load", "np.load", "numpy.load", "mx.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    assert not readers & set(calls)
    assert not {"eval", "exec"} & set(calls)


def test_inference_loads_no_compiler():
    loaded = in_new_python(
        "import sys; import numpy as np; from mlx_moe.config import OptimizerConfig;"
        "from mlx_moe.parameters import initialize; from mlx_moe.presets import load_architecture;"
        "from torch_ref.trainer import Trainer;"
        "config = load_architecture('llama', n_layers=1, d_model=32, n_heads=2, vocab_size=32, context_length=8);"
        "model = Trainer(config, initialize(config, 0), OptimizerConfig(), 'cpu');"
        "model.logits(np.zeros((1, 4), np.int32)); model.loss(np.zeros((1, 5), np.int32)); model.decoder();"
        "print('torch._dynamo' in sys.modules); model.optimizer_state(); print('torch._dynamo' in sys.modules)"
    )
    assert loaded.split() == ["False", "True"]


def test_data_is_refused_before_pytorch_loads():
    loaded = in_new_python(
        "import sys; import cli; sys.argv = ['mlxmoe', 'train', '--backend', 'torch', '--data', 'nothing.txt']\n"
        "try: cli.main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    assert loaded.split() == ["2", "False"]
