"""Every command of docs/guides/parity.md runs, in its order, on small models."""

import re
import shlex
from pathlib import Path

from support.any_models import save

DOCUMENT = Path(__file__).parents[2] / "docs" / "guides" / "parity.md"


def test_every_command_runs(mlxmoe, tmp_path, monkeypatch):
    from parity import self_test

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("parity.compare.preset_names", lambda kind: ["nano"])
    monkeypatch.setattr(self_test, "MUTATIONS", self_test.MUTATIONS[:2])
    monkeypatch.setattr(self_test, "SIZED", {})
    save("llama", tmp_path / "SmolLM2-135M")
    save("llama", tmp_path / "runs/mine")
    (block,) = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    for command in block.splitlines():
        result = mlxmoe(*shlex.split(command)[1:])
        assert result.code == 0, f"{command}\n{result.out}{result.err}"
    for page in ("llama.html", "certificate.html"):
        assert "3 of 3 models agree" in (tmp_path / page).read_text(encoding="utf-8")
