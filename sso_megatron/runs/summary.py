"""Makes ``summary.json`` of a run from the lines that were written and the results of the ranks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class RunTotals:
    """The numbers that a summary takes from the lines of ``metrics.jsonl``.

    Attributes:
        iterations: the last iteration; 0 before the first line.
        first_loss: loss of the first line that has one.
        last_loss: loss of the last line that has one.
    """

    iterations: int = 0
    first_loss: float | None = None
    last_loss: float | None = None

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Count further lines."""
        for line in lines:
            self.iterations = line["iteration"]
            if "loss" in line:
                self.last_loss = line["loss"]
                self.first_loss = self.last_loss if self.first_loss is None else self.first_loss


def summarize(
    totals: RunTotals,
    results: Iterable[tuple[float | None, float | None]],
    seconds: float,
    stop_reason: str | None,
) -> dict[str, Any]:
    """Return the fields of ``summary.json`` but for its time.

    Args:
        totals: numbers of the run's lines.
        results: largest radius error and validation loss of each rank; None where a rank has none.
        seconds: length of the training loop.
        stop_reason: text of the alarm that ended the run, if one did.
    """
    radius_errors, val_losses = zip(*results, strict=True)
    summary = {
        "first_loss": totals.first_loss,
        "last_loss": totals.last_loss,
        "val_loss": next((loss for loss in val_losses if loss is not None), None),
        "max_radius_error": max((error for error in radius_errors if error is not None), default=None),
        "iterations": totals.iterations,
        "seconds": round(seconds, 1),
    }
    return summary | ({"stopped": stop_reason} if stop_reason else {})
