"""The pages of the documentation and the code blocks in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "configs" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


pages = pytest.mark.parametrize("page", PAGES, ids=IDS)


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of these languages, in order."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]
