"""Reads the JSON files of a run that may be writing them, may have been killed meanwhile, or resumed.

``file_format`` describes the files. What a killed run left unfinished is never an error: it reads as if it
were not there. A file that is there but cannot be read (permissions, a directory, a disk that is gone)
raises OSError, since its reader would show less than the run has recorded.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""A JSON object: a line of ``metrics.jsonl`` or ``measures.jsonl``, or what a file holds."""


def parse_object(text: bytes) -> Record | None:
    """Parse a JSON object; return None for an unfinished text and for another value than an object."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_object(path: Path) -> Record:
    """Return the JSON object in a file; empty where the file is missing, unfinished, or holds no object.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    return parse_object(text) or {}


def read_lines(path: Path) -> Iterator[Record]:
    """Yield the records of a file, one a line; name other lines on standard error and leave them out.

    A record is a JSON object with an iteration, or with the names of tables' rows.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record = parse_object(line)
            if record is None or ("tables" not in record and iteration_of(record) is None):
                print(f"{path}, line {number} is not whole, and is left out", file=sys.stderr)
            else:
                yield record


def iteration_of(record: Record) -> int | None:
    """Return the iteration of a line; None where it has none."""
    try:
        return int(record["iteration"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


class IterationOrder:
    """Finds the lines at which a run was resumed, from their iterations in the order of the file.

    A line whose iteration is not beyond that of the line before begins a resumed part. The part replaces
    what earlier lines said of this iteration and of later ones.
    """

    def __init__(self) -> None:
        self._last: int | None = None

    def is_resumed_at(self, iteration: int) -> bool:
        """Take the next line's iteration; return whether the line begins a resumed part."""
        is_resumed = self._last is not None and iteration <= self._last
        self._last = iteration
        return is_resumed


def drop_from(kept: dict[int, Any], iteration: int) -> bool:
    """Remove this iteration and later ones, in place, from a dict whose keys are ascending iterations.

    Returns:
        Whether there were any.
    """
    size = len(kept)
    while kept and next(reversed(kept)) >= iteration:
        kept.popitem()
    return len(kept) < size


def by_iteration(records: Iterable[Record]) -> dict[int, Record]:
    """Return the lines that count, by iteration, ascending; lines without an iteration are left out."""
    found: dict[int, Record] = {}
    order = IterationOrder()
    for record in records:
        iteration = iteration_of(record)
        if iteration is None:
            continue
        if order.is_resumed_at(iteration):
            drop_from(found, iteration)
        found[iteration] = record
    return found
