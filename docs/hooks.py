"""The pages of the site that are made from the code and from files beside docs/, and its formulas.

MkDocs calls each function of an `on_` name. Formulas become MathML while the site is built, so a page needs no script
and no font to show them; a page that would fetch anything ends the build.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args, get_origin

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Files of the repository that are pages of the site, too.
INCLUDED = {
    "ARCHITECTURE.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/LOG.md": "log.md",
}
SET_BY_COMMANDS = ("start", "model.lora", "data.fit_vocabulary")  # no keys for users
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)((?:#[^)\s]*)?\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
TAG = re.compile(r"\\tag\{([^}]*)\}")


def on_files(files: Files, config: Any) -> Files:
    for source, page in INCLUDED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_relinked(text, posixpath.dirname(source), page)))
    files.append(File.generated(config, "reference/commands.md", content="\n".join(_commands())))
    files.append(File.generated(config, "reference/settings.md", content="\n".join(_settings())))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = page.file.src_uri
    if source in INCLUDED.values():
        return markdown
    return _relinked(markdown, posixpath.join("docs", posixpath.dirname(source)), source)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    return FORMULA.sub(lambda found: _mathml(unescape(found[3]), found[2] == "[", page.file.src_uri), html)


def on_post_build(config: Any) -> None:
    """Raise PluginError where a page would fetch something that is not part of the site."""
    for path in sorted(Path(config["site_dir"]).rglob("*.html")):
        finder = _Fetched()
        finder.feed(path.read_text(encoding="utf-8"))
        if finder.found:
            raise PluginError(f"{path} fetches {', '.join(finder.found)}; the site must be whole without a network")


class _Fetched(HTMLParser):
    """Collect addresses that a browser loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get("href") if tag == "link" and given.get("rel") != "canonical" else given.get("src")
        if address and re.match(r"(https?:)?//", address):
            self.found.append(address)


def _relinked(text: str, folder: str, page: str) -> str:
    """Turn links to files of the repository into links between pages.

    `folder` is where the text lies in the repository, `page` its place in docs/. Links to other files become plain
    text, since the site does not hold them.
    """

    def relinked(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        if target in INCLUDED:
            target = f"docs/{INCLUDED[target]}"
        if target == "README.md":
            target = "docs/index.md"
        start = posixpath.dirname(posixpath.join("docs", page))
        return f"{found[1]}{posixpath.relpath(target, start)}{found[3]}"

    return LINK.sub(relinked, text)


def _mathml(latex: str, is_display: bool, source: str) -> str:
    if not is_display:
        return convert(latex)
    number = TAG.search(latex)
    html = convert(TAG.sub("", latex).strip(), display="block")
    if number is None:
        return f'<div class="equation">{html}</div>'
    return f'<div class="equation" id="eq-{number[1]}">{html}<span class="number">({number[1]})</span></div>'


def _commands() -> Iterator[str]:
    """Write a section for every command: its help, arguments and options."""
    from typer.main import get_command

    from cli import app

    yield from ("# Commands", "", "Written from the command line itself: `mlxmoe COMMAND --help` says the same.", "")
    for name, command in _flat("mlxmoe", get_command(app)):
        parameters = [parameter for parameter in command.params if parameter.name != "help"]
        arguments = "".join(f" {_argument(parameter)}" for parameter in parameters if _is_argument(parameter))
        yield from (f"## {name}", "", _cell(command.help or ""), "", "```text")
        yield from (f"{name} [OPTIONS]{arguments}", "```", "")
        if parameters:
            yield from ("| option | default | what it does |", "|---|---|---|")
        for parameter in parameters:
            yield f"| {_option(parameter)} | {_default(parameter)} | {_cell(getattr(parameter, 'help', '') or '')} |"
        yield ""


def _flat(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    for word, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from _flat(f"{name} {word}", inner)
        else:
            yield f"{name} {word}", inner


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _argument(parameter: Any) -> str:
    name = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    if _is_argument(parameter):
        return f"`{_argument(parameter)}`"
    names = ", ".join(f"`{name}`" for name in sorted(parameter.opts, key=len, reverse=True))
    negative = "".join(f", `{name}`" for name in parameter.secondary_opts)
    return names + negative


def _default(parameter: Any) -> str:
    shown = parameter.show_default if isinstance(parameter.show_default, str) else None
    value = shown if shown is not None else parameter.default
    if value is None or value is False or (parameter.required and shown is None) or repr(value) == "Sentinel.UNSET":
        return ""
    return _cell(str(value)) if shown else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _settings() -> Iterator[str]:
    """Write a table for every section of a run's config: key, type, default, and the comment beside it."""
    from mlx_moe.config import RunConfig

    yield from ("# Settings", "")
    yield "Every key that `-o key=value` and `--config FILE` take, with its default. A preset may set another value:"
    yield "`mlxmoe params --preset NAME` shows the model that it makes. The phases shown are those of a run without a"
    yield from ("preset; another run names its own, each with the keys of its transfer.", "")
    yield from _section("", RunConfig)


def _section(prefix: str, model: Any) -> Iterator[str]:
    from mlx_moe.architecture import COMPONENTS

    inner: list[tuple[str, Any]] = []
    rows = []
    comments = _comments(model)
    for name, field in model.model_fields.items():
        if f"{prefix}{name}" in SET_BY_COMMANDS:
            continue
        if name == "phases":
            phases = field.get_default(call_default_factory=True)
            inner.extend((f"phases.{phase}.", type(settings)) for phase, settings in phases.items())
            continue
        nested = next((kind for kind in _kinds(field.annotation) if hasattr(kind, "model_fields")), None)
        if nested is not None:
            inner.append((f"{prefix}{name}.", nested))
            continue
        default = f"`{_yaml(field.default)}`"
        if field.default_factory or field.is_required():
            default = "from the others" if field.default_factory else "required"
        kind = _either(COMPONENTS[name]) if name in COMPONENTS else _type(field.annotation)
        rows.append(f"| `{prefix}{name}` | {kind} | {default} | {_cell(comments.get(name, ''))} |")
    if rows:
        yield from (f"## {prefix.rstrip('.') or 'The run'}", "", _cell(model.__doc__ or ""), "")
        yield from ("| key | type | default | meaning |", "|---|---|---|---|", *rows, "")
    for inner_prefix, nested in inner:
        yield from _section(inner_prefix, nested)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) or (annotation,)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is not None and str(annotation).startswith("typing.Literal"):
        return _either(get_args(annotation))
    kinds = [kind for kind in _kinds(annotation) if kind is not type(None)]
    names = {"int": "integer", "float": "number", "bool": "true or false", "str": "text", "tuple": "list"}
    text = " or ".join(dict.fromkeys(names.get(getattr(kind, "__name__", ""), "list") for kind in kinds))
    return f"{text} or null" if type(None) in _kinds(annotation) else text


def _either(values: Any) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _comments(model: Any) -> dict[str, str]:
    """Return the comment at the end of each field's line, of a model and of those that it extends."""
    import inspect

    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if kind.__module__.startswith("mlx_moe"):
            name = ""
            for line in inspect.getsource(kind).splitlines():
                field = re.match(r"    (\w+): ", line)
                name = field[1] if field else name
                comment = re.search(r"\s# (?!type: )(.*?)(?:\s+# .*)?$", line)
                if name and comment:
                    found[name] = comment[1]
    return found
