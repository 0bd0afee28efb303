"""The state of each logical matrix between steps, described once for the cache and for checkpoints.

In memory it is a batch's cache, an object with a tensor ``(b, ...)`` for each field. On disk it is one
dictionary of tensors for each matrix. An optimizer lists its fields in ``MatrixOptimizer.cached_fields``,
and saving, restoring and the check whether a checkpoint's state fits follow from that list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MatrixState = dict[str, Tensor]
"""The tensors that an algorithm keeps for one logical matrix from step to step, by name."""


@dataclass(frozen=True)
class CachedField:
    """One tensor of each logical matrix.

    Attributes:
        key: its name in checkpoints.
        attribute: its name in a batch's cache: a tensor ``(b, *shape)``, or one bool for the whole batch.
        shape: shape of one matrix's tensor.
        default: the value that a state without the key stands for; None where a state must have the key.
    """

    key: str
    attribute: str
    shape: tuple[int, ...] = ()
    default: float | None = None

    def find(self, state: MatrixState) -> Tensor | None:
        """Return the value in a matrix's state; None where it is missing or has another shape."""
        if self.key in state:
            return state[self.key] if state[self.key].shape == self.shape else None
        return None if self.default is None else torch.tensor(self.default)

    def placeholder(self) -> Tensor:
        """Return a value of the right shape that means nothing."""
        # From a given value: a plan makes other tensors on the meta device, where no bool can be read.
        return torch.tensor(1.0 if self.default is None else self.default).expand(self.shape)


Fields = Sequence[CachedField]


def fits(fields: Fields, state: MatrixState | None) -> bool:
    """Return whether a matrix's state has every field, so that nothing needs to be found anew."""
    return all(field.find(state or {}) is not None for field in fields)


def save_cache(fields: Fields, cache: Any, num_matrices: int) -> list[MatrixState]:
    """Return the state of each matrix of a batch, in tensors of their own on the host."""
    columns = {field.key: torch.as_tensor(getattr(cache, field.attribute)).cpu() for field in fields}
    return [
        {key: (column[i] if column.ndim else column).clone() for key, column in columns.items()}
        for i in range(num_matrices)
    ]


def restore_cache_(fields: Fields, cache: Any, states: Sequence[MatrixState | None]) -> None:
    """Copy into a cache, in place, the values that the states of its matrices have in the right shape.

    A field that is one bool becomes False only where every state fits and has it False.
    """
    for field in fields:
        column = getattr(cache, field.attribute)
        values = [field.find(state) if state else None for state in states]
        if isinstance(column, bool):
            are_known = all(fits(fields, state) for state in states)
            setattr(cache, field.attribute, not are_known or any(map(bool, values)))
            continue
        for index, value in enumerate(values):
            if value is not None:
                column[index] = value
