"""HTML pages from the templates beside this module: text that comes in is escaped, so no name becomes markup."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).resolve().parent / "templates"


def render_page(template: str, **values: Any) -> str:
    """Return a page.

    Args:
        template: file name in the folder `templates`.
        values: what the template shows; one that it names and does not get is an error.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
