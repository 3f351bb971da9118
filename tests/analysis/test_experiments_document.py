"""Every command of docs/guides/experiments.md runs, in its order, at a size of seconds."""

import re
import shlex
from pathlib import Path

import yaml

from mlx_moe.analysis.sweeps import SweepConfig, load_sweep, sweep_names
from mlx_moe.presets import preset_names
from mlx_moe.validation import validate

DOCUMENT = Path(__file__).parents[2] / "docs" / "guides" / "experiments.md"
SMALL = [
    *("-o", "phases.dense.steps=4", "-o", "data.n_documents=200", "-o", "data.tokenizer=bpe:300"),
    *("-o", "model.n_layers=1", "-o", "model.context_length=32", "-o", "training.eval_sequences=8", "--jobs", "2"),
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_command_runs(mlxmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be, that is the question.\n" * 100)
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) > 5
    for command in commands:
        words = shlex.split(command)[1:]
        if words[:2] == ["sweep", "upcycling"]:
            if load_sweep("upcycling").preset not in preset_names("runs"):
                continue
            words.append("--dry-run")
        elif words[0] == "sweep":
            words += SMALL
        result = mlxmoe(*words)
        assert result.code == 0, f"{command}\n{result.err}"


def test_the_example_is_a_sweep():
    (example,) = blocks("yaml")
    assert validate(SweepConfig, yaml.safe_load(example)).axes.keys() == {"model.d_model", "arm", "seed"}


def test_every_sweep_that_is_shipped_is_told_of():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in sweep_names() if f"`{name}`" not in text] == []
