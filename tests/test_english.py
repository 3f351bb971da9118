"""Docstrings open with a verb or a full noun phrase, as CONTRIBUTING.md asks."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("mlx_moe", "torch_ref", "parity", "cli.py", "tests/support", "benchmarks")
FILES = [*sorted(file for place in PLACES for file in (ROOT / place).rglob("*.py")), ROOT / "cli.py"]
OPENINGS = {"Of", "That", "Those", "But", "To", "By", "What", "Whether", "One"}
FRAGMENTS = {"How", "When", "Where", "Their", "Tied", "Greedily", "The same with", "The same but", "The same as"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def wrong_openings(source):
    """Return (line, opening) of each docstring that opens with one of the words, or without a capital or a backtick."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            opening = re.match(r"\W*(\w*(?: same \w+)?)", text)[1]
            if opening in OPENINGS | FRAGMENTS or not re.match(r"[A-Z`]", text):
                found.append((node.body[0].lineno, text.splitlines()[0]))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_or_a_noun(file):
    wrong = wrong_openings(file.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(f"{file.relative_to(ROOT)}:{line}: {text}" for line, text in wrong)


@pytest.mark.parametrize(
    "text",
    [
        *("Of the router", "What, if anything", "`Whether` it is", "One: the first", "Tied ones", "The same with it"),
        *("(nats, tokens) of a text", "3 tokens", "lower case"),
    ],
)
def test_an_opening_is_found(text):
    assert wrong_openings(f'def f():\n    """{text}."""') == [(2, f"{text}.")]


def test_good_openings_pass():
    assert wrong_openings('"""Whatever follows."""\ndef f():\n    """`loss` in nats."""') == []
