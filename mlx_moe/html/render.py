"""Render self-contained HTML pages, which open in a browser without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

SHARED = Path(__file__).parent


def render_page(folder: Path, template: str, **values: Any) -> str:
    """Return the page of a template in `folder`, which extends `base.html`. Values are escaped.

    Raises jinja2.UndefinedError where the template uses a value that is not given.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
