"""The files of a run: plain text, one line at a time, for whoever reads along.

- ``run.json``: what is trained how, written at the start.
- ``metrics.jsonl``: a line for each iteration, with the loss; where measured, headlines and alarms.
- ``measures.jsonl``: all that was measured, by row: the names of rows in a line of their own, then a line
  for each measured iteration with a list for each column.
- ``summary.json``: how it ended.

null is not known or not a number, 1e999 infinite.
"""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sso_megatron.runs.tables import Tables


def prepare_folder(folder: Path, goes_on: bool) -> None:
    """Make the folder of a run; two runs never share one, but a resumed run adds to its own.

    Raises:
        ValueError: it cannot be made or written to, or holds the records of another run.
    """
    flag = f"--spectral-run-dir {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag}: cannot be made ({error}); name another folder") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag}: cannot be written to; name another folder")
    if (folder / "metrics.jsonl").exists() and not goes_on:
        raise ValueError(f"{flag}: holds the records of a run; name another, or go on with --load")


_BLOCK = 1 << 16


class RunFiles:
    """Writes them; a full disk is told of and does not end the training."""

    def __init__(self, folder: Path) -> None:
        """Take the folder, which must exist."""
        self.folder = folder
        self._rows: dict[str, list[str]] | None = None

    def write_run(self, record: dict[str, Any]) -> None:
        """Write ``run.json``."""
        self._try("run.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))

    def append_lines(self, lines: list[dict[str, Any]]) -> None:
        """Append to ``metrics.jsonl``."""
        text = "".join(_json(line) + "\n" for line in lines)
        self._try("metrics.jsonl", lambda path: _append(path, text))

    def append_measures(self, iteration: int, time: float, lr: float | None, tables: Tables) -> None:
        """Append to ``measures.jsonl``."""
        text, rows = "", {name: list(table.rows) for name, table in tables.items()}
        if rows != self._rows:
            text = json.dumps({"tables": rows}) + "\n"
        parts = [f'"iteration": {iteration}', f'"time": {time:.3f}', f'"lr": {json.dumps(lr)}']
        for name, table in tables.items():
            columns = ", ".join(f'"{key}": {_numbers(column)}' for key, column in table.columns.items())
            parts.append(f'"{name}": {{{columns}}}')
        text += "{" + ", ".join(parts) + "}\n"
        if self._try("measures.jsonl", lambda path: _append(path, text)):
            self._rows = rows

    def read_summary(self) -> dict[str, Any]:
        """What ``summary.json`` says; nothing where there is none."""
        try:
            found = json.loads((self.folder / "summary.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_summary(self, record: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        self._try("summary.json", lambda path: path.write_text(_json(record) + "\n"))

    def _try(self, name: str, write: Callable[[Path], object]) -> bool:
        try:
            write(self.folder / name)
        except OSError as error:
            print(f"sso_megatron: records in {name} not written: {error}", flush=True)
            return False
        return True


def _json(value: Any) -> str:
    """JSON, which has neither NaN nor infinity, by the module's rule."""
    return re.sub(r'"(-?1e999)"', r"\1", json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else _number(value)


def _numbers(values: np.ndarray) -> str:
    """A JSON list with six digits."""
    if values.ndim > 1:
        return "[" + ",".join(map(_numbers, values)) + "]"
    return "[" + ",".join(map(_number, values.tolist())) + "]"


def _number(value: float) -> str:
    if math.isfinite(value):
        return f"{value:.6g}"
    return "null" if math.isnan(value) else f"{'-' if value < 0 else ''}1e999"


def _append(path: Path, text: str) -> None:
    """Add whole lines; one that a killed run, or a full disk, has left unfinished is taken away."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole:
            start = max(0, whole - _BLOCK)
            file.seek(start)
            place = file.read(whole - start).rfind(b"\n")
            whole = start + place + 1
            if place >= 0:
                break
        if whole < end:
            file.truncate(whole)
        file.write(text.encode())
