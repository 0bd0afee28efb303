"""The pages' form: short lines, a short README, and a picture of the package that names every module."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.pages import blocks, pages
from helpers.paths import ROOT


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pages
def test_lines_are_short(page: Path) -> None:
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 108 or line.startswith("|"), f"{page.name}:{number} has {len(line)} characters"


def test_the_picture_of_the_package_is_complete() -> None:
    """docs/development.md names every module, in its folder's part of the picture, and no other."""
    page = ROOT / "docs" / "development.md"
    picture = next(block for block in blocks(page, "") if block.startswith("sso_megatron/"))
    shown, folder = set(), ""
    for line in picture.splitlines()[1:]:
        if match := re.match(r"  (\w+/) ", line):
            folder = match[1]
            continue
        names = re.findall(r"\w+\.py", line)
        shown |= {f"{folder if line.startswith('    ') else ''}{name}" for name in names}
    package = ROOT / "sso_megatron"
    there = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    there = {name for name in there if not name.endswith("/__init__.py")}
    assert shown == there, "draw docs/development.md's picture anew"
