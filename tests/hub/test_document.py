"""Every command of docs/guides/hugging-face.md runs, in its order, on a tiny model of the same family."""

import json
import re
import shlex
from pathlib import Path

from support.published_models import save, save_tokenizer

DOCUMENT = Path(__file__).parents[2] / "docs" / "guides" / "hugging-face.md"


def test_every_command_runs(mlxmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("llama-tied", tmp_path / "SmolLM2-135M")
    save_tokenizer(tmp_path / "SmolLM2-135M")
    stories = [{"text": " ".join(f"w{(start + i) % 93}" for i in range(40))} for start in range(60)]
    (tmp_path / "my-stories.jsonl").write_text("".join(json.dumps(story) + "\n" for story in stories))
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) > 5
    for command in commands:
        words = [word.replace("32", "3").replace("length=64", "length=16") for word in shlex.split(command)[1:]]
        result = mlxmoe(*words)
        assert result.code == 0, f"{command}\n{result.err}"
