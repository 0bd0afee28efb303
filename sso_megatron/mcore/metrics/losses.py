"""The losses of iterations, which stay on the device until the next all-gather."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class IterationLoss:
    """An iteration that has no line in the run's files yet.

    Attributes:
        iteration: its number.
        time: when it ended, in seconds since the epoch.
        loss: the loss on the device; None where this rank has none, as on all pipeline stages but the
            last.
    """

    iteration: int
    time: float
    loss: Tensor | None


class PendingLosses:
    """Holds the iterations since the last all-gather. It never waits for the device. No collective."""

    def __init__(self) -> None:
        self._iterations: list[IterationLoss] = []

    def add(self, iteration: int, loss: Tensor | None) -> None:
        """Keep the loss of the iteration that has just ended."""
        self._iterations.append(IterationLoss(iteration, time.time(), loss))

    def take(self) -> list[IterationLoss]:
        """Return the iterations in their order, and forget them."""
        taken, self._iterations = self._iterations, []
        return taken


@torch.no_grad()
def loss_vector(iterations: Sequence[IterationLoss], device: torch.device) -> Tensor:
    """Return each iteration's loss and 1, or two zeros without a loss on this rank: ``(2 iterations,)``."""
    pairs = torch.zeros(len(iterations), 2, device=device)
    for place, iteration in enumerate(iterations):
        if iteration.loss is not None:
            pairs[place, 0], pairs[place, 1] = iteration.loss, 1.0
    return pairs.flatten()


def loss_lines(iterations: Sequence[IterationLoss], numbers: np.ndarray) -> list[dict[str, Any]]:
    """Return a line of ``metrics.jsonl`` for each iteration, with the loss of the first rank that has one.

    Args:
        iterations: this rank's; every rank has the same iterations.
        numbers: ``(world, 2 iterations)``, the ``loss_vector`` of each rank.
    """
    lines: list[dict[str, Any]] = []
    for place, iteration in enumerate(iterations):
        line: dict[str, Any] = {"iteration": iteration.iteration, "time": iteration.time}
        known = numbers[numbers[:, 2 * place + 1] > 0, 2 * place]
        if known.size:
            line["loss"] = float(known[0])
        lines.append(line)
    return lines
