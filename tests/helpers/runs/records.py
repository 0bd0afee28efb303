"""The records of a run, read without the package."""

import json
from pathlib import Path


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def measured(folder: Path, table: str, column: str) -> tuple[list[str], dict[int, list[float]]]:
    """Names of the rows, and the numbers by iteration, in a table's column."""
    head, *rest = lines(folder, "measures.jsonl")
    return head["tables"][table], {line["iteration"]: line[table][column] for line in rest}
