"""Every file in examples/ runs: scripts of a shell or of Python, notebooks, and the configs that they name.

A script runs in a folder of its own with `examples/` in it. `MLXMOE_STEPS`, where a script reads it, keeps a run short.
"""

import os
import sys
import warnings
from pathlib import Path
from subprocess import run

import pytest
import yaml

from mlx_moe.presets import load_run

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".sh", ".py", ".ipynb"))
CONFIGS = sorted(path.name for path in EXAMPLES.glob("*.yaml"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder as a reader has it, with the command on the path and no network."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "mlxmoe"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {EXAMPLES.parent / "cli.py"} "$@"\n')
    command.chmod(0o755)
    environment = {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(EXAMPLES.parent),
        "MLXMOE_CACHE": str(tmp_path / "cache"),
        "MLXMOE_STEPS": "2",
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs(name, folder):
    path = EXAMPLES / name
    if path.suffix == ".ipynb":
        run_notebook(path, folder)
        return
    program = "bash" if path.suffix == ".sh" else sys.executable
    result = run([program, f"examples/{name}"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_readme_shows_an_example_as_it_is():
    _, _, code = (EXAMPLES / "ten_lines.py").read_text(encoding="utf-8").split('"""', 2)
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert f"```python\n{code.strip()}\n```" in readme


@pytest.mark.parametrize("missing", ["torch", "mlx"])
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name in ("ten_lines.py", "grow_in_steps.py")])
def test_an_example_runs_on_either_backend(name, missing, folder):
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; runpy.run_path('examples/{name}', run_name='__main__')"
    result = run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "lossless" in result.stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_valid(name):
    assert load_run("demo", EXAMPLES / name).name == yaml.safe_load((EXAMPLES / name).read_text())["name"]


def test_a_notebook_that_fails_is_found(folder):
    nbformat = pytest.importorskip("nbformat")
    from nbclient.exceptions import CellExecutionError

    good = folder / "good.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import mlx_moe")]), good)
    run_notebook(good, folder)
    bad = folder / "bad.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), bad)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run_notebook(bad, folder)


def run_notebook(path, folder):
    """Run every cell in this environment's Python, whatever kernel the notebook names."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisPython(AsyncKernelManager):
        @property
        def kernel_spec(self):
            arguments = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=arguments, display_name="tests", language="python")

    notebook = nbformat.read(path, as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own
        NotebookClient(
            notebook, timeout=300, kernel_manager_class=ThisPython, resources={"metadata": {"path": str(folder)}}
        ).execute()
