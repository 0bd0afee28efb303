"""The pages' form: short lines, a short README, and a picture of the house that names every room."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from helpers.pages import blocks, pages
from helpers.paths import PACKAGE, ROOT, TESTS

DEVELOPMENT = ROOT / "docs" / "development.md"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pages
def test_lines_are_short(page: Path) -> None:
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 108 or line.startswith("|"), f"{page.name}:{number} has {len(line)} characters"


def test_the_picture_of_the_house_is_complete() -> None:
    """docs/development.md names every room, with the rooms of cli and mcore, and no other."""
    picture = next(block for block in blocks(DEVELOPMENT, "") if block.startswith("sso_megatron/"))
    shown, floor = set(), ""
    for line in picture.splitlines()[1:]:
        if match := re.match(r"  (\w+)/ ", line):
            floor = match[1]
            shown.add(floor)
        elif match := re.match(r"    (\w+)/ ", line):
            shown.add(f"{floor}/{match[1]}")
    rooms = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*/__init__.py")}
    assert shown == {room for room in rooms if "/" not in room or room.startswith(("cli/", "mcore/"))}


def test_no_room_is_a_drawer() -> None:
    rooms = Counter(path.parent for top in (PACKAGE, TESTS) for path in top.rglob("*.py"))
    drawers = [room for room, files in rooms.items() if files > 14]
    assert rooms[PACKAGE / "linalg"] and not drawers, f"{drawers}: find the rooms in them"


def test_the_files_to_read_first_are_there() -> None:
    section = DEVELOPMENT.read_text(encoding="utf-8").split("## Read these six files first\n")[1]
    files = re.findall(r"^\d\. `(\S+)`", section.split("\n## ")[0], re.MULTILINE)
    assert len(files) == 6 and all((ROOT / file).is_file() for file in files)
