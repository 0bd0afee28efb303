"""docs/configuration.md has every flag as the parser has it, docs/switching.md none that there is not."""

from __future__ import annotations

import argparse
import json
import re
import runpy

import pytest

from helpers.paths import ROOT
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS, config_classes

GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))


def test_the_page_of_flags_is_the_parser(megatron) -> None:
    """Megatron's own parser gets no flag that the page lacks, and each has one row, as it is now."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert GENERATE["refreshed"](page) == page, "refresh it with python docs/generate.py"
    tables = re.findall(r"<!-- flags: .+? -->\n(.*?)<!-- /flags -->", page, re.DOTALL)
    rows = [row.split(" | ")[0] for table in tables for row in table.splitlines()[2:]]
    flags = [flag for row in rows for flag in re.findall(r"`(--[\w-]+)`", row)]
    titles = re.findall(r"<!-- flags: (.+) -->", page)
    assert titles == list(GENERATE["groups"]())
    megatrons, ours = flags_of_megatron(megatron)
    assert sorted(flags) == sorted(ours)
    assert not megatrons & ours


def test_switching_names_flags_that_there_are(megatron) -> None:
    """Of the authors' fork nothing is installed."""
    page = (ROOT / "docs" / "switching.md").read_text(encoding="utf-8")
    named = {flag for flag in re.findall(r"--[a-z][\w-]+\w(?![\w-])", page) if "spectral-ball" not in flag}
    runs = {"--nproc-per-node"}
    plans = {"--world-size", "--flops"}
    megatrons, ours = flags_of_megatron(megatron)
    assert named - runs - plans <= megatrons | ours


def flags_of_megatron(megatron) -> tuple[set[str], set[str]]:
    """Those of its own, and those that its parser has because of us."""
    run = megatron.run(["flags.json"], main="probes.command:list_flags")
    theirs, all_flags = (set(flags) for flags in json.loads((run.folder / "flags.json").read_text()))
    return theirs, all_flags - theirs


@pytest.mark.parametrize(
    ("prefix", "dataclass"),
    [(prefix, config_type.__name__) for prefix, config_type in config_classes().items()],
)
def test_the_page_of_flags_names_optimizers_and_dataclasses(prefix: str, dataclass: str) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if f"| `{dataclass}` |" in line]
    assert f"`--{prefix.replace('_', '-')}-`" in row
    names = {name for name, kind in OPTIMIZERS.items() if kind.prefix == prefix}
    assert set(re.findall(r"`(\w+)`", row)) - {dataclass} == names


def test_a_table_shows_every_kind_of_flag() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group(title="sso_megatron: records")
        group.add_argument("--sso-momentum", dest="sso_momentum", type=float, default=0.9)
        group.add_argument("--sso-tangent", dest="sso_tangent", default="solve")
        group.add_argument("--spectral-exclude", dest="spectral_exclude", default=(), metavar="PATTERN")
        group.add_argument("--on", action=argparse.BooleanOptionalAction, default=True, help="a|b, c*d*e")
        group.add_argument("--folder", metavar="DIR", help="a (default here)")
        group.add_argument("--every", type=int, metavar="N", help="b")
        group.add_argument("--health", default="y", metavar="{x,y}", help="c (default y)")

    found = GENERATE["groups"](add)
    assert list(found) == ["records"]
    rows = [row.strip("| ").split(" | ") for row in GENERATE["table"](found["records"]).splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["`--sso-momentum`", "`0.9`", "number, in [0, 1)"],
        ["`--sso-tangent`", "`solve`", "`solve`, `project`, `none`"],
        ["`--spectral-exclude`", "none", "`PATTERN`"],
        ["`--on`, `--no-on`", "on", "on, off"],
        ["`--folder`", "none", "`DIR`"],
        ["`--every`", "none", "integer"],
        ["`--health`", "`y`", "`x`, `y`"],
    ]
    assert rows[0][3:] == ["decay of the gradient's moving average", "paper"]
    assert [row[3:] for row in rows[3:]] == [
        ["a\\|b, c\\*d\\*e", "ours"],
        ["a", "ours"],
        ["b", "ours"],
        ["c", "ours"],
    ]
