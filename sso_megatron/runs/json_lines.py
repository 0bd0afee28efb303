"""Files of JSON lines of a run that may have been killed while it wrote, and resumed."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines, without those that a killed run has not finished.

    A line that is no object is left out, too.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                yield record
            else:
                print(f"{path}, line {number} is not whole, and is left out", file=sys.stderr)


def by_iteration(records: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Records that have an iteration, ascending.

    One that is not beyond the last begins a resumed part, which replaces what came after.
    """
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        try:
            iteration = int(record["iteration"])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        while found and next(reversed(found)) >= iteration:
            found.popitem()
        found[iteration] = record
    return found
