"""What is measured of a run, as tables of numbers on the host, and the few that sum them up."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Measurements by row.

    Attributes:
        rows: names: of logical matrices, or of layers.
        columns: by name, float64 ``(rows,)``, or ``(rows, experts)`` for ``load``. NaN where a number is
            not known, infinite where it is.
    """

    rows: tuple[str, ...]
    columns: dict[str, Array]

    def column(self, name: str) -> Array:
        """Return a column of one number a row; all NaN if the table has none of that name."""
        found = self.columns.get(name)
        return np.full(len(self.rows), np.nan) if found is None else found


Tables = Mapping[str, Table]
"""``matrices``, ``layers`` and ``experts``; any of them may be missing."""

EMPTY = Table((), {})

ACTIVATIONS = ("residual", "attention", "mlp")
"""Where in a layer activations are measured: columns ``residual_rms``, ``residual_max`` and so on."""


def headlines(tables: Tables) -> dict[str, float | None]:
    """Sum a measurement up in a few numbers.

    Returns:
        ``radius_error`` and ``residual``, largest absolute value over the matrices; ``not_converged``,
        their number; ``update_ratio``, the median; ``activation_rms``, ``activation_max`` and
        ``logit_max``, largest over the layers; ``max_vio``, largest over layers with experts. None where
        no row has a number. Infinite where the number is.
    """
    matrices, layers, experts = (tables.get(name, EMPTY) for name in ("matrices", "layers", "experts"))
    converged = _known(matrices, "converged")
    ratios = _known(matrices, "update_ratio")
    return {
        "radius_error": _largest(np.abs(_known(matrices, "radius_error"))),
        "residual": _largest(np.abs(_known(matrices, "residual"))),
        "not_converged": float(np.sum(converged == 0)) if converged.size else None,
        "update_ratio": float(np.median(ratios)) if ratios.size else None,
        "activation_rms": _largest(_known(layers, *_activations("rms"))),
        "activation_max": _largest(_known(layers, *_activations("max"))),
        "logit_max": _largest(_known(layers, "logit_max")),
        "max_vio": _largest(_known(experts, "max_vio")),
    }


def _activations(what: str) -> Iterator[str]:
    return (f"{place}_{what}" for place in ACTIVATIONS)


def _known(table: Table, *columns: str) -> Array:
    numbers = np.concatenate([table.column(name).ravel() for name in columns])
    return numbers[~np.isnan(numbers)]


def _largest(numbers: Array) -> float | None:
    return float(numbers.max()) if numbers.size else None
