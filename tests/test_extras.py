"""A missing library is one line that says what to install, whichever command needs it."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mlx_moe.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"yaml": "pyyaml", "mlx_lm": "mlx-lm"}  # where the name to import is another
NEEDED_BY = {
    "mlx": ["train", "--preset", "demo", "--backend", "mlx"],
    "torch": ["train", "--preset", "demo", "--backend", "torch"],
    "transformers": ["parity", "--model", "model"],
    "mlx_lm": ["parity", "--model", "model"],
    "datasets": ["data", "describe", "--data", "tinystories", "--tokenizer", "char"],
    "huggingface_hub": ["import", "nobody/nothing", "out"],
    "pyarrow": ["data", "describe", "--data", "text.parquet", "--tokenizer", "char"],
    "matplotlib": ["plot", "model"],
    "trackio": ["train", "--preset", "demo", "-o", "training.tracker=trackio"],
    "wandb": ["train", "--preset", "demo", "-o", "training.tracker=wandb"],
}


def without(libraries, arguments, folder):
    """Run the command in a process in which the libraries cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({libraries!r})); import cli; cli.main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("library", EXTRAS)
def test_a_command_says_what_to_install(library, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "text.parquet").write_bytes(b"PAR1")
    result = without([library], NEEDED_BY[library], tmp_path)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert library in line
    assert f"pip install 'mlxmoe[{EXTRAS[library]}]'" in line


def test_a_run_of_our_own_needs_one_backend_and_no_other_extra(tmp_path):
    size = ["model.d_model=16", "model.n_heads=2", "model.n_layers=1", "model.context_length=16"]
    size += ["data.n_documents=50", "data.tokenizer=char", "phases.large_moe.d_model=24", "phases.large_moe.n_layers=2"]
    overrides = [word for setting in size for word in ("-o", setting)]
    command = ["train", "--preset", "demo", "--steps", "1", "--out", "run", *overrides]
    result = without([library for library in EXTRAS if library != "torch"], command, tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/boundaries/2-3.json").read_text())["passed"]


def test_every_import_is_a_dependency():
    """In the core, or named in EXTRAS and brought by that extra."""
    files = [
        ROOT / "cli.py",
        *(file for name in ("mlx_moe", "torch_ref", "parity") for file in (ROOT / name).rglob("*.py")),
    ]
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported |= {name.partition(".")[0] for name in names}
    theirs = imported - sys.stdlib_module_names - {"cli", "mlx_moe", "torch_ref", "parity"}
    core = distributions(PROJECT["dependencies"])
    assert {name for name in theirs if DISTRIBUTIONS.get(name, name) not in core} <= set(EXTRAS)
    for library, extra in EXTRAS.items():
        assert DISTRIBUTIONS.get(library, library) in distributions(PROJECT["optional-dependencies"][extra])


def distributions(requirements):
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}
