"""Renders HTML pages from the templates of the commands."""

from pathlib import Path
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """Return a page's text; the text of a value is escaped unless it is ``Markup``.

    Args:
        template: file of the template, relative to the folder ``cli``.
        values: values of the names in it; a name without a value is an error, not an empty place.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
