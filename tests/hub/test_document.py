"""Every command of docs/hugging-face.md runs, in its order, on a tiny model of the same family."""

import re
import shlex
from pathlib import Path

from published_models import save, save_tokenizer

DOCUMENT = Path(__file__).parents[2] / "docs" / "hugging-face.md"


def test_every_command_runs(mlxmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("llama-tied", tmp_path / "SmolLM2-135M")
    save_tokenizer(tmp_path / "SmolLM2-135M")
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) > 5
    for command in commands:
        result = mlxmoe(*(word.replace("32", "3") for word in shlex.split(command)[1:]))
        assert result.code == 0, f"{command}\n{result.err}"
