"""The documentation's site: it builds strictly, says all that the code knows, and fetches nothing."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli import app

pytest.importorskip("mkdocs", reason="the site needs mlxmoe[docs]")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_and_setting_is_there(site):
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert f'id="mlxmoe-{command.name}"' in commands
    settings = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    for key in (
        "name",
        "model.d_model",
        "phases.moe.router_init",
        "training.batch_size",
        "verification.probe_sequences",
    ):
        assert f"<code>{key}</code>" in settings
    assert "<code>layernorm_nobias</code>" in settings


def test_formulas_are_mathml_and_numbered_in_order(site):
    page = (site / "mathematics.html").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r'id="eq-(\d+)"', page)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 10
    assert "arithmatex" not in page
    assert "\\frac" not in re.sub(r"<annotation.*?</annotation>", "", page)


@pytest.mark.parametrize(
    "element",
    [
        '<script src="https://example.org/a.js"></script>',
        '<link rel="stylesheet" href="//example.org/a.css">',
        '<img src="http://example.org/a.png">',
    ],
)
def test_a_page_that_fetches_is_refused(element, hooks, tmp_path):
    from mkdocs.exceptions import PluginError

    page = tmp_path / "page.html"
    page.write_text('<a href="https://example.org">a link is no fetch</a><img src="a.png">', encoding="utf-8")
    hooks.on_post_build({"site_dir": tmp_path})
    page.write_text(element, encoding="utf-8")
    with pytest.raises(PluginError, match=r"example\.org"):
        hooks.on_post_build({"site_dir": tmp_path})
