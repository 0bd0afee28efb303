"""Reads the folder of a run as arrays; ``file_format`` describes its files, any of which may be missing."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sso_megatron.runs.criterion_table import Cell, cells_from
from sso_megatron.runs.file_format import DESCRIPTION, MEASURES, METRICS, SUMMARY
from sso_megatron.runs.json_lines import (
    IterationOrder,
    Record,
    by_iteration,
    drop_from,
    iteration_of,
    read_lines,
    read_object,
)
from sso_megatron.runs.json_numbers import array_of
from sso_megatron.runs.tables import TABLES


@dataclass(frozen=True)
class TableHistory:
    """The measurements of all logical matrices, of all layers, or of all MoE layers over a run.

    ``tables.Table`` is one of these measurements.

    Attributes:
        rows: global names of the logical matrices or layers that were ever measured.
        iterations: the iterations that were measured, ascending; (T,) integers.
        columns: (T, rows) of float32 by name; NaN where a row has no number.
        last: columns with a list for each row, such as ``load``: by name, the last measurement's lists by
            the names of their rows.
    """

    rows: list[str] = field(default_factory=list)
    iterations: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    last: dict[str, dict[str, list[float]]] = field(default_factory=dict)


@dataclass
class Run:
    """All that a run has recorded, without what a resumed part has replaced.

    Attributes:
        folder: the run's folder.
        name: what pictures and reports call the run; ``load`` gives every run another name.
        about: ``run.json``, what was trained how; empty if it is missing.
        summary: ``summary.json``, how the run ended; empty if it is missing.
        iterations: (n,) integers, ascending.
        loss: (n,) in nats a token; NaN where an iteration has none.
        seconds: (n,) wall time since the run's start; pauses before a resume count.
        alarms: iteration and text of every alarm, in order.
        criterion: a cell for each module of each layer; empty without ``--log-spectral-criterion``.
        tables: the measurements by the names in ``TABLES``, all three always; empty if not measured.
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
        """The run's ``--optimizer``; empty if ``run.json`` does not say."""
        return str(self.about.get("optimizer", ""))

    @property
    def settings(self) -> dict[str, Any]:
        """The optimizer's settings by name, as far as ``run.json`` says."""
        return self.about.get("settings") or {}

    @property
    def has_spheres(self) -> bool:
        """Whether the distance of weights from their spheres was measured."""
        return "radius_error" in self.tables["matrices"].columns


def load(folders: Iterable[Path]) -> list[Run]:
    """Read runs, and name each by the end of its path, as long as it takes to tell the runs apart.

    Lines that a killed run left unfinished are named on standard error and left out.

    Args:
        folders: what ``--spectral-run-dir`` named, for each run.

    Returns:
        A run for each folder, in the same order.

    Raises:
        ValueError: a folder is missing or without records, or is given twice.
        OSError: a file is there and cannot be read.
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
    # measures.jsonl still has the iterations that a resumed part replaced and did not measure.
    measured = {i for i, line in lines.items() if "headlines" in line} if lines else None
    tables = _tables(_lines(folder / MEASURES), measured)
    if not lines and not tables["layers"].rows:
        raise ValueError(
            f"{folder} has no records, neither {METRICS} nor {MEASURES}; name a folder that a run's "
            "--spectral-run-dir named"
        )
    iterations = list(lines)
    times = array_of([lines[i].get("time") for i in iterations])
    about = read_object(folder / DESCRIPTION)
    # A resume writes run.json again, so that its start may be later than the first lines.
    start = np.fmin.reduce(array_of([about.get("started"), *times.tolist()]), initial=np.inf)
    return Run(
        folder,
        folder.resolve().name,
        about,
        read_object(folder / SUMMARY),
        np.array(iterations, int),
        array_of([lines[i].get("loss") for i in iterations]),
        times - start,
        [(i, text) for i in iterations for text in lines[i].get("alarms") or []],
        cells_from([lines[i]["criterion"] for i in iterations if "criterion" in lines[i]]),
        tables,
    )


def _lines(path: Path) -> Iterable[Record]:
    return read_lines(path) if path.exists() else ()


def _tables(lines: Iterable[Record], measured: set[int] | None) -> dict[str, TableHistory]:
    """Collect the measurements of each table; rows may change where a run was resumed.

    Args:
        lines: the lines of ``measures.jsonl``.
        measured: iterations whose measurements count; None for all.
    """
    names: dict[str, list[str]] = {}
    rows: dict[str, dict[str, int]] = {table: {} for table in TABLES}
    # By table and iteration: the places of the measured rows among all rows, and the numbers by column.
    found: dict[str, dict[int, tuple[np.ndarray, dict[str, np.ndarray]]]] = {table: {} for table in TABLES}
    last: dict[str, dict[str, dict[str, list[float]]]] = {table: {} for table in TABLES}
    order = IterationOrder()
    for line in lines:
        if "tables" in line:
            names = line["tables"]
        iteration = iteration_of(line)
        if iteration is None:
            continue
        if order.is_resumed_at(iteration):
            for table, measurements in found.items():
                if drop_from(measurements, iteration):
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
                    columns[column] = array_of(values, np.float32)
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
