"""``sso-megatron plot`` draws one or several runs, and writes a report with all pictures."""

import argparse
from pathlib import Path

from sso_megatron.cli.plot import axes as plot_axes
from sso_megatron.cli.plot import layers as plot_layers
from sso_megatron.cli.plot import matrices as plot_matrices
from sso_megatron.cli.plot import report as plot_report
from sso_megatron.cli.plot import singular as plot_singular
from sso_megatron.cli.plot import training as plot_training
from sso_megatron.cli.plot.axes import Picture
from sso_megatron.runs.reader import load

FORMATS = ("png", "svg")
PICTURES = [plot_training.PICTURE, *plot_matrices.PICTURES, *plot_layers.PICTURES]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sso-megatron plot``."""
    parser.description = (
        "Draw what runs with --spectral-run-dir have recorded, several of them overlaid, and write "
        "report.html, which holds every picture and needs no network. What a run has not recorded is left "
        "out; the report says which flag gives it."
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder that a run's --spectral-run-dir named")
    add("--output", type=Path, metavar="DIR", help="default: plots in a single run's folder, else plots")
    text = "of the pictures (default: both); the report is always written"
    add("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help=text)
    text = "also draw the singular values of matrices whose names this regular expression is found in"
    add("--weights", metavar="PATTERN", help=text)
    text = "a single run's checkpoints (default: where it saved them, or RUN/checkpoint)"
    add("--checkpoints", type=Path, metavar="DIR", help=text)


def run(options: argparse.Namespace) -> int:
    """Run the ``plot`` command."""
    plot_singular.check(options)
    runs = load(options.runs)
    pictures = [*PICTURES, plot_singular.picture(options, runs)]
    folder: Path = options.output or (runs[0].folder / "plots" if len(runs) == 1 else Path("plots"))
    drawn: dict[Picture, str] = {}
    missing = []
    folder.mkdir(parents=True, exist_ok=True)
    with plot_axes.look():
        for picture in pictures:
            figure = picture.draw(runs)
            if figure is None:
                missing.append(picture)
                continue
            plot_axes.lay_out(figure)
            svg = plot_axes.svg_of(figure)
            if "png" in options.format:
                figure.savefig(folder / f"{picture.name}.png")
            if "svg" in options.format:
                (folder / f"{picture.name}.svg").write_text(svg, encoding="utf-8")
            drawn[picture] = plot_report.element(picture, figure, svg)
    report = plot_report.write(folder / "report.html", runs, drawn, missing)
    print(f"{report}: {len(drawn)} pictures of {len(runs)} run{'s' if len(runs) > 1 else ''}")
    return 0
