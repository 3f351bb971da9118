"""Every `mlxmoe` command of the README and of the guide to training runs, in its order, at a size of seconds."""

import json
import re
import shlex
from pathlib import Path

import pytest
from support.published_models import save, save_tokenizer

from mlx_moe.data.stories import story

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "docs/guides/training.md"]

SMALL = [
    *("--steps", "2", "-o", "data.n_documents=100", "-o", "model.d_model=32", "-o", "model.n_layers=2"),
    *("-o", "model.n_heads=2", "-o", "model.context_length=32", "-o", "training.eval_sequences=4"),
    *("-o", "phases.moe.n_experts=4"),
]
# Sizes of the phases that grow, by what names them.
GROWTH = {
    "grow-first": ["-o", "phases.large.d_model=48", "-o", "phases.large.n_layers=3"],
    "my-run.yaml": ["-o", "phases.large.d_model=48", "-o", "phases.large.n_layers=3"],
    "": ["-o", "phases.large_moe.d_model=48", "-o", "phases.large_moe.n_layers=3"],
}
OFFLINE = {"--data": "stories", "--tokenizer": "bpe:300"}
PLACEHOLDERS = {"IN": "model", "1024": "64", "12": "3", "bpe:4096": "bpe:300"}


def commands(document: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    in_blocks = [line for block in blocks for line in block.splitlines()]
    in_text = re.findall(r"`(mlxmoe [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [command for command in in_blocks + in_text if command.startswith("mlxmoe ")]


def scaled(command: str) -> list[str]:
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)[1:]]
    if words[0] == "train" and "--resume" not in words:
        words += [*SMALL, *next(size for name, size in GROWTH.items() if not name or name in words)]
        for option, value in OFFLINE.items():
            if option not in words:
                words += [option, value]
    return words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_runs(document, mlxmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (json.dumps({"text": story(i)}) + "\n" for i in range(200))
    (tmp_path / "my-stories.jsonl").write_text("".join(lines), encoding="utf-8")
    if configs := re.findall(r"```yaml\n# my-run.yaml\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL):
        (tmp_path / "my-run.yaml").write_text(configs[0])
    save("llama-tied", tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    found = commands(document)
    assert len(found) > 5
    for command in found:
        result = mlxmoe(*scaled(command))
        assert result.code == 0, f"{command}\n{result.err}"


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), target
