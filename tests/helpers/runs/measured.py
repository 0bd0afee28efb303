"""What a run measured of itself, read back, and whether two runs measured the same."""

import json
from typing import Any

import numpy as np
import pytest

from helpers.megatron_runs import Run

Measured = dict[str, dict[str, dict[str, Any]]]
"""Table, row, column."""


def records(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def measured(run: Run) -> dict[int, Measured]:
    """By iteration."""
    found, rows = {}, {}
    for line in (run.folder / "measures.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "tables" in record:
            rows = record["tables"]
            continue
        found[record["iteration"]] = {
            table: {
                row: {column: values[place] for column, values in record[table].items()}
                for place, row in enumerate(names)
            }
            for table, names in rows.items()
        }
    return found


# What differences are measured by where a number is near zero: norms by the radius, shares by 1; and
# updates by those of training, since one with a learning rate of zero has rounding alone.
LEAST = {"radius_error": 1.0, "clipped_share": 1.0, "update_rms": 1e-4, "update_ratio": 1e-3}
# Rounding decides now and then which way the search for lambda takes, in one matrix of a hundred. The step
# is the same: what the search leaves is rotated away. Inner products of unit matrices: how far apart all
# but these may be, and these.
SEARCHED = {"lam": (1e-4, 2e-2), "residual": (1e-3, 0.1)}


def assert_same_measures(run: Run, reference: Run) -> None:
    """Rows and columns are the same, and numbers to 1e-3; prints how well."""
    found, wanted = measured(run), measured(reference)
    assert found.keys() == wanted.keys()
    errors: dict[str, list[float]] = {}
    for iteration, tables in wanted.items():
        assert found[iteration].keys() == tables.keys()
        for table, rows in tables.items():
            assert list(found[iteration][table]) == list(rows), "the same rows in the same order"
            for name, row in rows.items():
                assert found[iteration][table][name].keys() == row.keys()
                for column, value in row.items():
                    a, b = (np.array(x, float) for x in (found[iteration][table][name][column], value))
                    missing = np.isnan(b)  # as the MLP of a layer that has none
                    assert (np.isnan(a) == missing).all(), f"{name}: {column}"
                    scale = 1.0 if column in SEARCHED else np.maximum(abs(b), LEAST.get(column, 1e-12))
                    error = np.where(missing, 0.0, abs(a - b) / scale)
                    assert np.isfinite(error).all(), f"{name}: {column}"
                    errors.setdefault(column, []).append(float(error.max()))
    print({column: f"{max(values):.1e}" for column, values in errors.items()})
    for column, values in errors.items():
        if column in SEARCHED:
            most, all_of_them = SEARCHED[column]
            num_apart = sum(value > most for value in values)
            assert num_apart <= max(1, 0.02 * len(values)) and max(values) <= all_of_them, column
        else:
            assert max(values) <= 1e-3, column
    assert run.losses == pytest.approx(reference.losses, rel=1e-4)
