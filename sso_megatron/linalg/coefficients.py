"""Takes the coefficient tables of the Newton-Schulz polynomials from emerging-optimizers.

Outside ``mcore/`` and ``cli/`` only this file and ``linalg/symmetric.py`` import emerging-optimizers: the
tables are there, with their sources, and a second copy here could only drift.
"""

import functools

Coefficients = tuple[tuple[float, float, float], ...]

# Tables whose last row is a contraction at 1 continue with that row; the others start again.
_REPEAT_LAST = frozenset({"polar_express", "cans", "deepseekv4"})


@functools.cache
def _tables() -> dict[str, Coefficients]:
    try:
        from emerging_optimizers.orthogonalized_optimizers import muon_utils
    except ImportError as error:
        raise ImportError(
            "sso_megatron takes its polar coefficient tables from the package emerging-optimizers, "
            f"which cannot be imported ({error}); pip install emerging-optimizers==0.3.0"
        ) from error
    return {
        name: tuple((float(a), float(b), float(c)) for a, b, c in rows)
        for name, rows in muon_utils._COEFFICIENT_SETS.items()
    }


def coefficient_types() -> tuple[str, ...]:
    """Return the names of the tables that ``polar_coefficients`` accepts.

    Raises:
        ImportError: emerging-optimizers is not installed.
    """
    return tuple(_tables())


def polar_coefficients(coefficient_type: str, num_steps: int) -> Coefficients:
    """Return the ``(a, b, c)`` of each Newton-Schulz step ``X <- a X + (b A + c A^2) X``, ``A = X X^T``.

    Args:
        coefficient_type: ``polar_express`` (arXiv 2505.16932, lower bound 1e-3, safety 1.01, 8 rows)
            or another table of emerging-optimizers; see ``coefficient_types``.
        num_steps: how many steps, at least 1. Beyond the table's length the last row is repeated
            (polar_express, cans, deepseekv4) or the table starts again.

    Raises:
        ValueError: an unknown table or fewer than one step.
        ImportError: emerging-optimizers is not installed.
    """
    tables = _tables()
    if coefficient_type not in tables:
        raise ValueError(
            f"coefficient_type={coefficient_type!r} is unknown; choose one of {', '.join(tables)}"
        )
    if num_steps < 1:
        raise ValueError(f"msign_steps={num_steps} must be at least 1; the default is 8")
    rows = tables[coefficient_type]
    if coefficient_type in _REPEAT_LAST:
        return tuple(rows[min(i, len(rows) - 1)] for i in range(num_steps))
    return tuple(rows[i % len(rows)] for i in range(num_steps))
