"""The measurements of one iteration as tables of numbers on the host, and the headlines of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """The measurements of one iteration of all logical matrices, of all layers, or of all MoE layers.

    ``reader.TableHistory`` is the same over a whole run.

    Attributes:
        rows: global names of the logical matrices or layers.
        columns: by name, float64 ``(rows,)``, or ``(rows, experts)`` for ``load``. NaN where a number is
            not known; an infinite measurement stays infinite.
    """

    rows: tuple[str, ...]
    columns: dict[str, Array]

    def column(self, name: str) -> Array:
        """Return a column that has one number a row; all NaN if the table has no column of that name."""
        found = self.columns.get(name)
        return np.full(len(self.rows), np.nan) if found is None else found


TABLES = ("matrices", "layers", "experts")
"""Names of the tables: one row a logical matrix, a layer, or a layer with experts."""

Tables = Mapping[str, Table]
"""The tables of one iteration by their names in ``TABLES``; any of them may be missing."""

EMPTY = Table((), {})

ACTIVATIONS = ("residual", "attention", "mlp")
"""Where in a layer activations are measured: columns ``residual_rms``, ``residual_max`` and so on."""


def headlines(tables: Tables) -> dict[str, float | None]:
    """Sum a measurement up in a few numbers.

    Returns:
        ``radius_error`` and ``residual``, the largest absolute values over the matrices;
        ``not_converged``, the number of matrices whose solver did not converge; ``update_ratio``, the
        median over the matrices; ``activation_rms``, ``activation_max`` and ``logit_max``, the largest
        over the layers; ``max_vio``, the largest over the layers with experts. None where no row has a
        number; infinite where the largest is.
    """
    matrices, layers, experts = (tables.get(name, EMPTY) for name in TABLES)
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
