"""`sso-megatron criterion`: which modules a spectral update should help, from a run's records."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from sso_megatron.runs import criterion_table


def add_parser(subparsers: Any) -> None:
    """Add the `criterion` command to the parser of `sso-megatron`."""
    text = "which modules a spectral update should help"
    parser = subparsers.add_parser(
        "criterion",
        help=text,
        description=f"{text.capitalize()}: nuclear rank of the gradient by stable rank of the incoming "
        "activations (arXiv 2512.04299), of a run with --log-spectral-criterion N. Above 1 it should help.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN", help="folder that the run's --spectral-run-dir named")
    add("--by-layer", action="store_true", help="a row for each module of each layer")
    add("--since", type=int, default=0, metavar="N", help="leave out iterations before this one")
    add("--json", type=Path, metavar="FILE", help="write the medians of every module and layer")
    add("--picture", type=Path, metavar="FILE.png", help="draw the heat map")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the `criterion` command; return 0, or 2 after a one-line error."""
    try:
        cells, iterations = criterion_table.read(options.folder, options.since)
        if options.json:
            record = {"iterations": iterations, "modules": [dataclasses.asdict(cell) for cell in cells]}
            options.json.write_text(json.dumps(record, indent=1) + "\n")
        if options.picture:
            criterion_table.draw(options.picture, cells)
    except (ValueError, OSError) as error:
        print(f"sso-megatron criterion: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    criterion_table.print_table(cells, iterations, console, by_layer=options.by_layer)
    return 0
