"""Distributes the work on a batch of cut matrices over the ranks of a tensor-parallel group.

A placement allocates a buffer for this rank's shards of ``b`` equal matrices and returns the matrices that
this rank works on: ``(b', p, q)`` whole matrices, or this rank's rows of matrices whose rows are cut (``q``
is always whole), and then ``all_reduce`` sums over the ranks that hold the other rows. Every rank of the
group issues the same sequence of collectives.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sso_megatron.linalg.polar import AllReduce
from sso_megatron.parallel.shards import Shards, all_reduce

Slots = list[list[Tensor]]
"""For each tensor, the views that this rank's shards are copied into, one for each matrix of a batch."""


class Placement(Protocol):
    """Where the matrices of a batch are worked on; the module says how it is used.

    Attributes:
        members: range of the batch's matrices that this rank works on.
    """

    members: range

    @property
    def all_reduce(self) -> AllReduce | None:
        """Sum over the ranks that hold the other rows; None where this rank works on whole matrices."""

    def allocate(self, num_tensors: int, **options: Any) -> tuple[Tensor, Slots]:
        """Make a buffer for ``num_tensors`` tensors of each matrix, and its slots.

        Args:
            num_tensors: tensors of each matrix.
            options: dtype and device.
        """

    def gather(self, buffer: Tensor, num_tensors: int) -> Tensor:
        """Return what is worked on, ``(num_tensors, b', p, q)``, from the buffer with its slots filled."""

    def local_shards(self, values: Tensor) -> list[Tensor]:
        """Return this rank's shard of each of ``members``, views of what is worked on, ``(b', p, q)``."""

    def broadcast_values(self, values: Tensor) -> Tensor:
        """Return ``(b,)`` numbers of all matrices on every rank, from those of ``members``, ``(b',)``."""


class Local:
    """Works on matrices that this rank holds whole. No collectives."""

    all_reduce = None

    def __init__(self, num_matrices: int, shape: tuple[int, int]) -> None:
        """Take the size of the batch and its matrices' shape."""
        self.members = range(num_matrices)
        self._shape = shape

    def allocate(self, num_tensors: int, **options: Any) -> tuple[Tensor, Slots]:
        """Make a buffer for the matrices themselves."""
        buffer = torch.empty(num_tensors, len(self.members), *self._shape, **options)
        return buffer, [list(tensor.unbind()) for tensor in buffer]

    def gather(self, buffer: Tensor, num_tensors: int) -> Tensor:
        """Return the matrices themselves."""
        return buffer

    def local_shards(self, values: Tensor) -> list[Tensor]:
        """Return the matrices themselves."""
        return list(values.unbind())

    def broadcast_values(self, values: Tensor) -> Tensor:
        """Return the numbers themselves."""
        return values


class Duplicated:
    """Works on the whole matrices on every rank, with the same result everywhere.

    Collectives: one all-gather in ``gather``.
    """

    all_reduce = None

    def __init__(self, shards: Shards) -> None:
        """Take how the matrices of the batch are cut."""
        self.members = range(len(shards.cuts))
        self._shards = shards

    def allocate(self, num_tensors: int, **options: Any) -> tuple[Tensor, Slots]:
        """Make a buffer for this rank's shards."""
        return self._shards.allocate(num_tensors, **options)

    def gather(self, buffer: Tensor, num_tensors: int) -> Tensor:
        """Return whole matrices ``(num_tensors, b', m, n)``."""
        return self._shards.gather(buffer, num_tensors, self.members)

    def local_shards(self, values: Tensor) -> list[Tensor]:
        """Return this rank's shards of whole matrices, views."""
        cuts = (self._shards.cuts[i] for i in self.members)
        return [cut.shard(value, self._shards.rank) for cut, value in zip(cuts, values, strict=True)]

    def broadcast_values(self, values: Tensor) -> Tensor:
        """Return the numbers themselves: every rank has them."""
        return values


class Owner(Duplicated):
    """Works on whole matrices, each on one rank of the group.

    In a step an ``Exchange`` brings the matrices to their owners and the results back. ``allocate`` and
    ``gather`` serve to inspect the matrices between steps, and gather all of them on every rank.

    Collectives: one all-gather in ``gather``, one all-reduce in ``broadcast_values``.
    """

    def __init__(self, shards: Shards, members: range) -> None:
        """Take how the matrices of the batch are cut, and which of them are this rank's."""
        super().__init__(shards)
        self.members = members

    def broadcast_values(self, values: Tensor) -> Tensor:
        """Return every owner's numbers."""
        shared = values.new_zeros(len(self._shards.cuts))
        shared[self.members.start : self.members.stop] = values
        dist.all_reduce(shared, group=self._shards.tp_group)
        return shared


class Distributed:
    """Works on the shards where they are, and sums what contracts the cut dimension over the group.

    Matrices whose columns are cut are worked on transposed. Shards of unequal height are padded with zero
    rows. Collectives: one all-reduce for each call of ``all_reduce``.
    """

    def __init__(self, shards: Shards) -> None:
        """Take how the matrices of the batch are cut."""
        self.members = range(len(shards.cuts))
        self._shards = shards
        self._shapes = [cut.shard_shape(shards.rank) for cut in shards.cuts]
        self._transposes = shards.cuts[0].dim == 1

    def allocate(self, num_tensors: int, **options: Any) -> tuple[Tensor, Slots]:
        """Make a buffer for the shards as they are stored."""
        ranks = range(self._shards.size)
        height = max(cut.shard_shape(rank)[0] for cut in self._shards.cuts for rank in ranks)
        buffer = torch.zeros(num_tensors, len(self.members), height, self._shapes[0][1], **options)
        return buffer, [self._cropped(tensor) for tensor in buffer]

    def gather(self, buffer: Tensor, num_tensors: int) -> Tensor:
        """Return the shards, cut dimension first."""
        return buffer.mT if self._transposes else buffer

    def local_shards(self, values: Tensor) -> list[Tensor]:
        """Return the shards as they are stored, without padding."""
        return self._cropped(values.mT if self._transposes else values)

    def broadcast_values(self, values: Tensor) -> Tensor:
        """Return the numbers themselves: every rank has them."""
        return values

    def all_reduce(self, part: Tensor) -> Tensor:
        """Return the sum of ``part`` over the group; ``part`` may be overwritten."""
        return all_reduce(part, self._shards.tp_group)

    def _cropped(self, values: Tensor) -> list[Tensor]:
        return [value[:rows] for value, (rows, _) in zip(values, self._shapes, strict=True)]


def place(mode: str, shards: Shards) -> Placement:
    """Return the placement of ``--spectral-tp-mode duplicated`` or ``distributed``."""
    return Duplicated(shards) if mode == "duplicated" else Distributed(shards)
