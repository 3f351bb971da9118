"""Every command of docs/tutorial.md runs, in its order, with two steps a phase; examples/tour.sh has the same."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TUTORIAL, flags=re.DOTALL) for line in block.splitlines()]


def test_every_command_runs(mlxmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert len(COMMANDS) > 7
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if words[0] == "train":
            words += ["--steps", "2", "-o", "data.n_documents=200", "-o", "training.eval_sequences=4"]
        result = mlxmoe(*words)
        assert result.code == 0, f"{command}\n{result.err}"
        if words[0] in ("upcycle", "grow"):
            assert "lossless" in result.out
    assert (tmp_path / "tour-export" / "config.json").is_file()


def test_the_config_is_the_one_that_is_shown():
    (shown,) = re.findall(r"```yaml\n(.*?)```", TUTORIAL, flags=re.DOTALL)
    assert shown == (ROOT / "examples" / "tour.yaml").read_text(encoding="utf-8")


def test_the_script_runs_the_same_commands():
    script = (ROOT / "examples" / "tour.sh").read_text(encoding="utf-8").replace(" $steps", "")
    assert {line for line in script.splitlines() if line.startswith("mlxmoe ")} <= set(COMMANDS)
