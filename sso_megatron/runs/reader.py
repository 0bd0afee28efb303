"""What a run has written into its ``--spectral-run-dir``, as arrays.

Every part may be missing: an older folder has no ``run.json``, a run that still goes on has no
``summary.json``, and only a measured one has ``measures.jsonl``.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sso_megatron.runs.criterion_table import Cell, cells_from
from sso_megatron.runs.json_lines import by_iteration, read_lines

METRICS, MEASURES = "metrics.jsonl", "measures.jsonl"


@dataclass(frozen=True)
class TableHistory:
    """Measurements of one kind of rows: logical matrices, layers, or layers with experts.

    Attributes:
        rows: global names, of all that were ever measured.
        iterations: of the measurements, ascending; (T,) integers.
        columns: (T, rows) of float32 by name; NaN where there is no number.
        last: columns of lists, of the last measurement alone: by name a list of numbers for each row.
    """

    rows: list[str] = field(default_factory=list)
    iterations: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    last: dict[str, dict[str, list[float]]] = field(default_factory=dict)


@dataclass
class Run:
    """The records of a run.

    Attributes:
        folder: where they are.
        name: to be shown; ``load`` makes it different for every run.
        about: ``run.json``: what was run.
        summary: ``summary.json``: how it ended.
        iterations: (n,) integers, ascending.
        loss: (n,) in nats a token; NaN where an iteration has none.
        seconds: (n,) wall time since the run's start; pauses before a resume are part of it.
        alarms: iteration and text, in order.
        criterion: of ``--log-spectral-criterion``.
        tables: ``matrices``, ``layers`` and ``experts``.
    """

    folder: Path
    name: str
    about: dict[str, Any]
    summary: dict[str, Any]
    iterations: np.ndarray
    loss: np.ndarray
    seconds: np.ndarray
    alarms: list[tuple[int, str]]
    criterion: list[Cell]
    tables: dict[str, TableHistory]

    @property
    def optimizer(self) -> str:
        """The run's ``--optimizer``; empty where it is not known."""
        return str(self.about.get("optimizer", ""))

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its optimizer, as far as they are known."""
        return self.about.get("settings") or {}

    @property
    def has_spheres(self) -> bool:
        """Whether a radius was measured for its matrices."""
        return "radius_error" in self.tables["matrices"].columns


def load(folders: Iterable[Path]) -> list[Run]:
    """Read runs and give each a name of its own: the end of its path, as long as needed.

    Raises:
        ValueError: a folder is missing or without records, or stands there twice.
        OSError: a file cannot be read.
    """
    runs = [_load(folder) for folder in folders]
    paths = [run.folder.resolve().parts for run in runs]
    if len(set(paths)) < len(paths):
        twice = next(run.folder for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1)
        raise ValueError(f"{twice} is given twice; name each run once")
    for run, path in zip(runs, paths, strict=True):
        length = next(n for n in range(1, len(path) + 1) if sum(p[-n:] == path[-n:] for p in paths) == 1)
        run.name = "/".join(path[-length:])
    return runs


def _load(folder: Path) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name one that a run's --spectral-run-dir named")
    lines = by_iteration(_lines(folder / METRICS))
    # What a resume has replaced, and not measured again, stands in the other file still.
    measured = {i for i, line in lines.items() if "headlines" in line} if lines else None
    tables = _tables(_lines(folder / MEASURES), measured)
    if not lines and not tables["layers"].rows:
        raise ValueError(
            f"{folder} has no records, neither {METRICS} nor {MEASURES}; name a folder that a run's "
            "--spectral-run-dir named"
        )
    iterations = list(lines)
    times = _numbers([lines[i].get("time") for i in iterations])
    about = _object(folder / "run.json")
    # A resumed run has begun before its run.json says.
    start = np.fmin.reduce(_numbers([about.get("started"), *times.tolist()]), initial=np.inf)
    return Run(
        folder,
        folder.resolve().name,
        about,
        _object(folder / "summary.json"),
        np.array(iterations, int),
        _numbers([lines[i].get("loss") for i in iterations]),
        times - start,
        [(i, text) for i in iterations for text in lines[i].get("alarms") or []],
        cells_from([lines[i]["criterion"] for i in iterations if "criterion" in lines[i]]),
        tables,
    )


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    return read_lines(path) if path.exists() else ()


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is missing or half written."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(values: Iterable[Any]) -> np.ndarray:
    """As float64; NaN where there is no number."""
    known = [value if isinstance(value, int | float) else np.nan for value in values]
    return np.array(known, dtype=np.float64)


def _tables(lines: Iterable[dict[str, Any]], measured: set[int] | None) -> dict[str, TableHistory]:
    """The tables of ``measures.jsonl``; rows may change where a run was resumed.

    Args:
        lines: of the file.
        measured: iterations that count; None if that is not known.
    """
    names: dict[str, list[str]] = {}
    rows: dict[str, dict[str, int]] = {"matrices": {}, "layers": {}, "experts": {}}
    # By table and iteration: where its numbers belong, and the numbers by column.
    found: dict[str, dict[int, tuple[np.ndarray, dict[str, np.ndarray]]]] = {table: {} for table in rows}
    last: dict[str, dict[str, dict[str, list[float]]]] = {table: {} for table in rows}
    for line in lines:
        if "tables" in line:
            names = line["tables"]
        if "iteration" not in line:
            continue
        iteration = int(line["iteration"])
        for table, known_ones in found.items():
            while known_ones and next(reversed(known_ones)) >= iteration:  # resumed
                known_ones.popitem()
                last[table].clear()
        if measured is not None and iteration not in measured:
            continue
        for table, known in rows.items():
            if not line.get(table) or not names.get(table):
                continue
            places = np.array([known.setdefault(name, len(known)) for name in names[table]])
            columns = {}
            for column, values in line[table].items():
                if any(isinstance(value, list) for value in values):
                    last[table][column] = dict(zip(names[table], values, strict=True))
                else:
                    columns[column] = np.array(values, np.float32)
            found[table][iteration] = places, columns
    return {table: _table(list(rows[table]), found[table], last[table]) for table in rows}


def _table(
    rows: list[str],
    found: dict[int, tuple[np.ndarray, dict[str, np.ndarray]]],
    last: dict[str, dict[str, list[float]]],
) -> TableHistory:
    iterations = list(found)
    columns: dict[str, np.ndarray] = {}
    for t, iteration in enumerate(iterations):
        places, values = found[iteration]
        for column, numbers in values.items():
            if column not in columns:
                columns[column] = np.full((len(iterations), len(rows)), np.nan, np.float32)
            columns[column][t, places] = numbers
    return TableHistory(rows, np.array(iterations, int), columns, last)
