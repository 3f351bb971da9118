"""Every `mlxmoe` command of the README runs, in the README's order, at a size of seconds."""

import json
import re
import shlex
from pathlib import Path

import pytest

from mlx_moe.data.stories import story

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALL = [
    *("--steps", "2", "-o", "data.n_documents=100", "-o", "model.d_model=32", "-o", "model.n_layers=2"),
    *("-o", "model.n_heads=2", "-o", "model.context_length=32", "-o", "training.eval_sequences=4"),
    *("-o", "phases.large_moe.d_model=48", "-o", "phases.large_moe.n_layers=3"),
]
OFFLINE = {"--data": "stories", "--tokenizer": "bpe:300"}
PLACEHOLDERS = {"IN": "runs/mine/phases/1-dense", "RUN": "runs/mine", "1024": "64", "bpe:4096": "bpe:300"}


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    in_blocks = [line for block in blocks for line in block.splitlines()]
    in_text = re.findall(r"`(mlxmoe [^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    return [command for command in in_blocks + in_text if command.startswith("mlxmoe ")]


def scaled(command: str, number: int) -> list[str]:
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)[1:]]
    words = [f"out-{number}" if word == "OUT" else word for word in words]
    if words[0] == "train" and "--resume" not in words:
        words += SMALL
        for option, value in OFFLINE.items():
            if option not in words:
                words += [option, value]
    return words


def test_every_command_runs(mlxmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (json.dumps({"text": story(i)}) + "\n" for i in range(200))
    (tmp_path / "my-stories.jsonl").write_text("".join(lines), encoding="utf-8")
    found = commands()
    assert len(found) > 10
    for number, command in enumerate(found):
        result = mlxmoe(*scaled(command, number))
        assert result.code == 0, f"{command}\n{result.err}"


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md"])
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
