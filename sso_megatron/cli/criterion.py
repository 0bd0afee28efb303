"""``sso-megatron criterion`` says which modules a spectral update should help, from a run's records."""

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console

from sso_megatron.runs import criterion_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sso-megatron criterion``."""
    parser.description = (
        "Which modules a spectral update should help: nuclear rank of the gradient by stable rank of the "
        "incoming activations (arXiv 2512.04299), of a run with --log-spectral-criterion N. Above 1 it "
        "should help."
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN", help="folder that the run's --spectral-run-dir named")
    add("--by-layer", action="store_true", help="a row for each module of each layer")
    add("--since", type=int, default=0, metavar="N", help="leave out iterations before this one")
    add("--json", type=Path, metavar="FILE", help="write the medians of every module and layer")
    add("--picture", type=Path, metavar="FILE.png", help="draw the heat map")


def run(options: argparse.Namespace) -> int:
    """Run the ``criterion`` command."""
    cells, iterations = criterion_table.read(options.folder, options.since)
    if options.json:
        record = {"iterations": iterations, "modules": [dataclasses.asdict(cell) for cell in cells]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.picture:
        criterion_table.draw(options.picture, cells)
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    criterion_table.print_table(cells, iterations, console, by_layer=options.by_layer)
    return 0
