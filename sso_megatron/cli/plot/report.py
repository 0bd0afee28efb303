"""Writes the report, one HTML file with every picture of some runs, without scripts and network."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from sso_megatron.cli.plot import axes as plot_axes
from sso_megatron.cli.plot.axes import Picture
from sso_megatron.cli.shared import pages
from sso_megatron.runs.live_state import parallel_sizes
from sso_megatron.runs.reader import Run
from sso_megatron.version import __version__

_MAX_ALARMS = 30
"""Most groups of alarms that are listed for a run."""

# The place before an id in matplotlib's SVG, and before each reference to one.
_ID = re.compile(r'(?<=\bid=")(?=[^"])|(?<=url\(#)|(?<=href="#)')


@dataclass(frozen=True)
class RepeatedAlarm:
    """Alarms of a run that differ in their numbers alone.

    Attributes:
        run: name of the run.
        text: text of the first alarm.
        first: iteration of the first alarm.
        last: iteration of the last alarm.
        count: number of alarms.
    """

    run: str
    text: str
    first: int
    last: int
    count: int


def write(
    path: Path, runs: Sequence[Run], drawn: Mapping[Picture, str], missing: Sequence[Picture]
) -> Path:
    """Write the report as one HTML file.

    Args:
        path: file to write.
        runs: the runs that are reported.
        drawn: HTML elements of the pictures, in order.
        missing: pictures that the runs have no records for.
    """
    found = [alarms(run) for run in runs]
    text = pages.render(
        "plot/report.html.j2",
        runs=runs,
        rows=_facts(runs),
        settings=_settings(runs),
        pictures=[(picture, Markup(svg)) for picture, svg in drawn.items()],
        missing=missing,
        alarms=[alarm for of_run in found for alarm in of_run[:_MAX_ALARMS]],
        num_left_out=sum(max(0, len(of_run) - _MAX_ALARMS) for of_run in found),
        version=__version__,
    )
    path.write_text(text, encoding="utf-8")
    return path


def alarms(run: Run) -> list[RepeatedAlarm]:
    """Group a run's alarms that differ in numbers alone, in the order of each group's first alarm."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for iteration, text in run.alarms:
        if text.startswith("... and"):  # how many more there were
            continue
        kinds.setdefault(re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", text), []).append((iteration, text))
    return [
        RepeatedAlarm(run.name, found[0][1], found[0][0], found[-1][0], len(found))
        for found in kinds.values()
    ]


def _facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table of runs: the name of a fact, and its text for each run."""
    facts = [
        ("optimizer", [run.optimizer for run in runs]),
        ("iterations", [_number(_last_iteration(run)) for run in runs]),
        ("tokens", [_number(_tokens(run)) for run in runs]),
        ("first loss", [_number(run.summary.get("first_loss")) for run in runs]),
        ("last loss", [_number(run.summary.get("last_loss")) for run in runs]),
        ("validation loss", [_number(run.summary.get("val_loss")) for run in runs]),
        ("largest radius error", [_number(run.summary.get("max_radius_error")) for run in runs]),
        ("training time, s", [_number(run.summary.get("seconds")) for run in runs]),
        ("ranks", [_number(run.about.get("world_size")) for run in runs]),
        ("parallel", [parallel_sizes(run.about) for run in runs]),
        ("started", [_date(run.about.get("started")) for run in runs]),
        ("alarms", [str(len(run.alarms)) for run in runs]),
    ]
    return [(name, values) for name, values in facts if any(values)]


def _last_iteration(run: Run) -> int | None:
    return int(run.iterations[-1]) if len(run.iterations) else run.summary.get("iterations")


def _tokens(run: Run) -> int | None:
    last, each = _last_iteration(run), run.about.get("tokens_per_iteration")
    return last * each if last and each else None


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else f"{value:.4g}"


def _date(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return all settings of a single run, or the settings in which several runs differ."""
    all_settings = [_flat(run.about) for run in runs]
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    table = [(name, [settings.get(name, "") for settings in all_settings]) for name in names]
    return [row for row in table if len(runs) == 1 or len(set(row[1])) > 1]


def _flat(about: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "train_iters": about.get("train_iters"),
        "tokens_per_iteration": about.get("tokens_per_iteration"),
    }
    for part in ("training", "settings", "shared", "versions"):
        found |= about.get(part) or {}
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in found.items()
        if value is not None
    }


def element(picture: Picture, figure: Figure, svg: str) -> str:
    """Return a picture as an HTML element, with unique ids and a text for people who do not see it.

    Args:
        picture: name and title.
        figure: the drawn figure.
        svg: the figure as an SVG file's text.
    """
    text = _ID.sub(f"{picture.name}-", svg[svg.index("<svg ") :])
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # A size in points would not shrink with the page.
    width = f'style="max-width: {figure.get_figwidth() * 96:.0f}px"'
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    label = Markup.escape(_alternative(picture, figure))
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" {width} ', 1)


def _alternative(picture: Picture, figure: Figure) -> str:
    """Describe in words what a picture shows: its panels, and each line's first and last value."""
    told = []
    for axis in figure.axes:
        ends = []
        labelled = axis.get_legend_handles_labels()[0]
        for line in axis.lines:
            values = np.asarray(line.get_ydata(), float)
            if len(values) and line in labelled:
                label = plot_axes.plain_name(str(line.get_label()))
                ends.append(f"{label} from {values[0]:.3g} to {values[-1]:.3g}")
        title = plot_axes.plain_name(axis.get_title() or axis.get_title("left"))
        name = title.replace("\n", ", ") or axis.get_ylabel()
        against = f" against {axis.get_xlabel()}" if axis.get_xlabel() else ""
        told.append(f"{name}{against}" + (f": {', '.join(ends)}" if ends else ""))
    labels = (
        f" {figure.get_supylabel()} against {figure.get_supxlabel()}." if figure.get_supxlabel() else ""
    )
    return f"{picture.title}.{labels} " + "; ".join(text for text in told if text) + "."
