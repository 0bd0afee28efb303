"""Write the settings tables of the documentation: ``python docs/generate.py``.

Each table stands between ``<!-- settings:CONFIG -->`` and ``<!-- /settings -->``, where CONFIG is a
dataclass of ``sso_megatron.optimizers.config``; what is between the markers is replaced.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from sso_megatron.optimizers import config
from sso_megatron.optimizers.settings import choices_of

DOCS = Path(__file__).resolve().parent
_MARKED = re.compile(r"(<!-- settings:(\w+) -->\n).*?(<!-- /settings -->)", re.DOTALL)


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


def table(config_type: Any) -> str:
    """The Markdown table of a dataclass: a row for each field, in the order of the class."""
    lines = ["| setting | default | meaning | source |", "|---|---|---|---|"]
    for field in dataclasses.fields(config_type):
        default = _shown(field.default)
        choices = choices_of(config_type, field.name)
        others = [f"`{choice}`" for choice in choices if choice != field.default]
        shown = f"`{default}`" + (f"; or {', '.join(others)}" if others else "")
        source = field.metadata["source"] or "ours"
        cells = (f"`{field.name}`", shown, field.metadata["help"], source)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default) if default != () else "none"


def refreshed(text: str) -> str:
    """The page's text with every table as the dataclasses are now."""
    return _MARKED.sub(lambda m: m[1] + table(getattr(config, m[2])) + m[3], text)


def main() -> None:
    """Rewrite the pages whose tables changed."""
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = refreshed(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"rewrote {page.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
