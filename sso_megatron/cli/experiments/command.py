"""``sso-megatron render`` prints the flags of an experiment, checked by Megatron's own parser."""

import argparse
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sso_megatron.cli.experiments import fragments as experiments
from sso_megatron.cli.experiments.fragments import Experiment, Given
from sso_megatron.cli.shared import megatron_process

if TYPE_CHECKING:
    from sso_megatron.mcore.flags.megatron_parser import FlagParser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sso-megatron render``."""
    parser.description = (
        "The flags of an experiment of configs/, for a command line, a flag a line, each checked by "
        "Megatron's parser. EXPERIMENT is a name in configs/experiments or a YAML file. Flags of python "
        "-m sso_megatron.pretrain_gpt behind it replace the experiment's; a switch is taken away by: "
        "--bf16 false."
    )
    parser.usage = "%(prog)s [options of its own] EXPERIMENT [MEGATRON_FLAGS...]"
    parser.allow_abbrev = False
    add = parser.add_argument
    add("--point", type=int, metavar="I", help="a point of the experiment's sweep, counted from 0")
    add("--null", action="store_true", help="words that end with a NUL, for scripts and xargs -0")
    folder = "folder with experiments and fragments (default: configs/ of the checkout)"
    add("--configs", type=Path, metavar="DIR", help=folder)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--list", action="store_true", help="all experiments; EXPERIMENT is not given")
    points = "the sweep's points: of each a line with its index, a tab and its name"
    add("--points", action="store_true", help=points)
    name = "a name for the run's folder: the experiment, and with --point a slash and the point's name"
    add("--name", action="store_true", help=name)
    parser.set_defaults(takes_megatron_flags=True)


def run(options: argparse.Namespace) -> int:
    """Run the ``render`` command."""
    name, *flags = options.megatron_flags or [""]
    if options.list:
        _show_list(options)
        return 0
    if not name or name.startswith("-"):
        raise ValueError("name an experiment first, then its flags; --list shows all experiments")
    experiment = experiments.read(name, options.configs)
    if options.points:
        for index, point in enumerate(experiment.points()):
            print(index, experiments.point_name(point), sep="\t")
        return 0
    if options.name:
        parts = [experiment.name]
        if options.point is not None:
            parts.append(experiments.point_name(experiment.point(options.point)))
        print("/".join(parts))
        return 0
    lines = render(experiment, options.point, flags)
    if experiment.sweep and options.point is None:
        swept = ", ".join(experiment.sweep)
        print(
            f"sso-megatron render: {experiment.name} has a sweep over {swept}, which is left out; --points "
            "shows its points, --point I takes one",
            file=sys.stderr,
        )
    if options.null:
        print("".join(f"{word}\0" for line in lines for word in line), end="")
    else:
        print(" \\\n".join(map(shlex.join, lines)))
    return 0


def render(experiment: Experiment, index: int | None, more: Sequence[str]) -> list[list[str]]:
    """Return the words of each flag.

    Args:
        experiment: experiment, as it was read.
        index: index of a point of its sweep; None for no point.
        more: flags of a command line, which replace those of the experiment.

    Raises:
        ValueError: something is no flag, or does not take its value; the message says where it is.
    """
    swept = {} if index is None else experiment.point(index)
    parser = _parser()
    given = experiment.flags | {flag: Given(value, experiment.path) for flag, value in swept.items()}
    lines: dict[str, list[str]] = {}
    there: dict[str, tuple[str, Given]] = {}
    for flag, what in given.items():
        setting, words = _read(parser, flag, what)
        if words and setting in lines:
            other, place = there[setting]
            raise ValueError(
                f"{what.path}: {flag} sets the same as {other} in {place.path}; give one of them, or the "
                "other as false"
            )
        if words:
            lines[setting], there[setting] = words, (flag, what)
    fixed = {parser.setting(flag) for flag in swept}
    for flag, values in parser.split(more):
        setting = parser.setting(flag)
        if setting in fixed:
            raise ValueError(f"{flag} with --point {index}: the point sets it; leave one of them out")
        lines[setting] = parser.words(flag, values)
    return [words for words in lines.values() if words]


@functools.cache
def _parser() -> "FlagParser":
    with megatron_process.without_noise() as (_, said):
        try:
            megatron_process.enter_without_gpu()
            from sso_megatron.mcore.flags.megatron_parser import FlagParser

            return FlagParser()
        except SystemExit:
            raise ValueError(megatron_process.reason(said.getvalue())) from None
        except ImportError as error:
            raise ValueError(str(error)) from None


def _read(parser: "FlagParser", flag: str, what: Given) -> tuple[str, list[str]]:
    """Return what a flag sets, and its words; an error names the file."""
    try:
        return parser.setting(flag), parser.words(flag, what.value)
    except ValueError as error:
        raise ValueError(f"{what.path}: {error}") from None


def _show_list(options: argparse.Namespace) -> None:
    table = Table("experiment", "about", "points", box=None)
    folder = experiments.configs_folder(options.configs)
    for name in experiments.names(folder):
        found = experiments.read(name, folder)
        table.add_row(name, found.about, str(len(found.points()) or ""))
    console = Console(markup=False)
    console = console if console.is_terminal else Console(markup=False, width=200)
    console.print(table)
