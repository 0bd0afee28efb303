"""Measurements of what a spectral optimizer's step did to its weights, for ``--log-spectral-metrics``."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sso_megatron.mcore.metrics.rank_gather import Contribution, Key
from sso_megatron.mcore.parameters.names import expert_by_itself
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.measures import StepMeasures
from sso_megatron.runs.tables import EMPTY, Table

_PARTS = ("weight_square", "update_square", "numel")


class WeightMeter:
    """Makes optimizers measure a step, and keeps this rank's share of the results.

    Data-parallel ranks that step on the same matrices divide the reports among them. No collective.
    """

    def __init__(
        self,
        optimizers: Sequence[SpectralOptimizer],
        is_sharded: bool,
        groups: Any,
        device: torch.device,
    ) -> None:
        """Find the matrices.

        Args:
            optimizers: this rank's spectral optimizers, all of one class.
            is_sharded: whether data-parallel ranks step on different matrices.
            groups: Megatron's process groups.
            device: device of this rank's numbers; a rank may have none.
        """
        self._optimizers, self._device = optimizers, device
        self._parts: list[tuple[str, Key]] = []  # with the name that the optimizer has for the matrix
        self._whole: list[tuple[str, Key]] = []
        numels: list[int] = []
        for optimizer in optimizers:
            for batch in optimizer.batches:
                replicas = groups.expt_dp if batch.group.get("is_expert_parallel") else groups.dp_cp
                rank, size = (0, 1) if is_sharded else (replicas.rank(), replicas.size())
                part = batch.shards.rank if batch.shards is not None else 0
                held = [member for member in batch.members if member.split.rows]
                for member in held[rank::size]:
                    self._parts.append((member.name, (expert_by_itself(member.name), part)))
                    numels.append(member.split.read(member.param).numel())
                for member in batch.here[rank::size]:
                    self._whole.append((member.name, (expert_by_itself(member.name), 0)))
        self._numels = torch.tensor(numels, dtype=torch.float32, device=device)[:, None]
        columns = {name for optimizer in optimizers for name in optimizer.columns}
        order = [name for optimizer in optimizers for name in optimizer.columns]
        self._columns = tuple(sorted(columns, key=order.index))

    @property
    def contributions(self) -> dict[str, Contribution]:
        """The rows that this rank reports: its shards of matrices, and the matrices that it works on."""
        return {
            "parts": Contribution([key for _, key in self._parts], sums=_PARTS),
            "whole": Contribution([key for _, key in self._whole], sums=self._columns),
        }

    def start(self) -> None:
        """Make the optimizers measure the next step."""
        for optimizer in self._optimizers:
            optimizer.measures = StepMeasures()

    def finish(self) -> dict[str, Tensor]:
        """Return the numbers for ``contributions``; NaN where no step was taken."""
        parts: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for optimizer in self._optimizers:
            assert optimizer.measures is not None
            parts |= optimizer.measures.parts
            whole |= optimizer.measures.whole
            optimizer.measures = None
        squares = self._stacked(self._parts, parts, len(_PARTS) - 1)
        return {
            "parts": torch.cat([squares, self._numels], dim=1),
            "whole": self._stacked(self._whole, whole, len(self._columns)),
        }

    def _stacked(
        self, matrices: list[tuple[str, Key]], values: dict[str, Tensor], num_columns: int
    ) -> Tensor:
        """Return the values as ``(matrices, columns)``, NaN for a matrix without values."""
        unknown = torch.full((num_columns,), torch.nan, device=self._device)
        rows = [values.get(name, unknown) for name, _ in matrices]
        return torch.stack(rows) if rows else unknown.new_empty(0, num_columns)


def table(
    parts: tuple[tuple[str, ...], dict[str, np.ndarray]],
    whole: tuple[tuple[str, ...], dict[str, np.ndarray]],
) -> Table:
    """Return the table ``matrices`` from rows and columns that ``RankGather`` has reduced.

    ``update_rms`` and ``update_ratio`` measure the weight's whole change in the step, which includes
    retraction and weight decay.
    """
    rows, sums = parts
    if not rows:
        return EMPTY
    assert rows == whole[0]
    weight, update = sums["weight_square"], sums["update_square"]
    norms = whole[1]["spectral_norm"]
    with np.errstate(divide="ignore", invalid="ignore"):
        derived = {
            "spectral_norm": norms,
            "frobenius_norm": np.sqrt(weight),
            "stable_rank": weight / norms**2,
            "update_rms": np.sqrt(update / sums["numel"]),
            "update_ratio": np.sqrt(update / weight),
        }
    return Table(rows, derived | {name: v for name, v in whole[1].items() if name != "spectral_norm"})
