"""Writes the records of a run into its folder; ``file_format`` describes them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sso_megatron.runs.file_format import DESCRIPTION, MEASURES, METRICS, SUMMARY
from sso_megatron.runs.json_lines import read_object
from sso_megatron.runs.json_numbers import array_text, json_text
from sso_megatron.runs.tables import Tables

_BLOCK_BYTES = 1 << 16


def prepare_folder(folder: Path, goes_on: bool) -> None:
    """Make the folder of a run. Two runs never share a folder; a resumed run appends to its own.

    Args:
        folder: what ``--spectral-run-dir`` names.
        goes_on: whether the run is resumed from a checkpoint.

    Raises:
        ValueError: the folder cannot be made or written to, or holds the records of another run.
    """
    flag = f"--spectral-run-dir {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag}: cannot be made ({error}); name another folder") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag}: cannot be written to; name another folder")
    if (folder / METRICS).exists() and not goes_on:
        raise ValueError(f"{flag}: holds the records of a run; name another, or go on with --load")


class RunFiles:
    """Writes a run's records. A disk that is full or gone is reported, and does not end the training."""

    def __init__(self, folder: Path) -> None:
        """Take the run's folder, which must exist."""
        self.folder = folder
        self._rows: dict[str, list[str]] | None = None

    def write_run(self, record: dict[str, Any]) -> None:
        """Write ``run.json``."""
        self._try(DESCRIPTION, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))

    def append_lines(self, lines: list[dict[str, Any]]) -> None:
        """Append lines to ``metrics.jsonl``."""
        text = "".join(json_text(line) + "\n" for line in lines)
        self._try(METRICS, lambda path: _append(path, text))

    def append_measures(self, iteration: int, time: float, lr: float | None, tables: Tables) -> None:
        """Append a measurement to ``measures.jsonl``, after the names of rows if these have changed."""
        text, rows = "", {name: list(table.rows) for name, table in tables.items()}
        if rows != self._rows:
            text = json.dumps({"tables": rows}) + "\n"
        parts = [f'"iteration": {iteration}', f'"time": {time:.3f}', f'"lr": {json.dumps(lr)}']
        for name, table in tables.items():
            columns = ", ".join(f'"{key}": {array_text(column)}' for key, column in table.columns.items())
            parts.append(f'"{name}": {{{columns}}}')
        text += "{" + ", ".join(parts) + "}\n"
        if self._try(MEASURES, lambda path: _append(path, text)):
            self._rows = rows

    def read_summary(self) -> dict[str, Any]:
        """Return what ``summary.json`` holds; empty where the file is missing, unfinished or unreadable."""
        try:
            return read_object(self.folder / SUMMARY)
        except OSError as error:
            print(f"sso_megatron: records in {SUMMARY} not read: {error}", flush=True)
            return {}

    def write_summary(self, record: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        self._try(SUMMARY, lambda path: path.write_text(json_text(record) + "\n"))

    def _try(self, name: str, write: Callable[[Path], object]) -> bool:
        try:
            write(self.folder / name)
        except OSError as error:
            print(f"sso_megatron: records in {name} not written: {error}", flush=True)
            return False
        return True


def _append(path: Path, text: str) -> None:
    """Append whole lines, after removing a line that a killed run or a full disk left unfinished."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole:
            start = max(0, whole - _BLOCK_BYTES)
            file.seek(start)
            place = file.read(whole - start).rfind(b"\n")
            whole = start + place + 1
            if place >= 0:
                break
        if whole < end:
            file.truncate(whole)
        file.write(text.encode())
