"""Which rank of a tensor-parallel group works on which part of a batch of cut matrices.

A placement makes room for this rank's shards of ``b`` equal matrices and hands out what this rank is to
work on: ``(b', p, q)`` whole matrices, or this rank's rows of matrices whose rows are cut (``q`` is
always whole), and then ``total`` sums over the ranks that hold the other rows. Everything a placement
does is the same sequence of collectives on every rank of the group.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sso_megatron.linalg.polar import Total
from sso_megatron.parallel.shards import Shards

Slots = list[list[Tensor]]
"""For each of some tensors the views, one for each matrix of a batch, to copy this rank's shards into."""


class Placement(Protocol):
    """See the module.

    Attributes:
        members: matrices of the batch that this rank works on, a range of places in the batch.
    """

    members: range

    @property
    def total(self) -> Total | None:
        """Sum over the ranks that hold the other rows; None where matrices are handed out whole."""

    def stage(self, num_tensors: int, **options: Any) -> tuple[Tensor, Slots]:
        """Room for ``num_tensors`` tensors of each matrix, and its slots.

        Args:
            num_tensors: tensors of each matrix.
            options: dtype and device.
        """

    def spread(self, room: Tensor, num_tensors: int) -> Tensor:
        """``(num_tensors, b', p, q)`` to work on, from the room with its slots filled."""

    def own(self, values: Tensor) -> list[Tensor]:
        """This rank's shard of each of ``members``, views of what is worked on, ``(b', p, q)``."""

    def share(self, values: Tensor) -> Tensor:
        """``(b,)`` numbers on every rank from one for each of ``members``, ``(b',)``."""


class Local:
    """Matrices that lie whole on this rank. No collectives."""

    total = None

    def __init__(self, num_matrices: int, shape: tuple[int, int]) -> None:
        """Take the size of the batch and its matrices' shape."""
        self.members = range(num_matrices)
        self._shape = shape

    def stage(self, num_tensors: int, **options: Any) -> tuple[Tensor, Slots]:
        """Room for the matrices themselves."""
        room = torch.empty(num_tensors, len(self.members), *self._shape, **options)
        return room, [list(tensor.unbind()) for tensor in room]

    def spread(self, room: Tensor, num_tensors: int) -> Tensor:
        """The matrices themselves."""
        return room

    def own(self, values: Tensor) -> list[Tensor]:
        """The matrices themselves."""
        return list(values.unbind())

    def share(self, values: Tensor) -> Tensor:
        """The numbers themselves."""
        return values


class Duplicated:
    """Every rank gathers the whole matrices and does the same work.

    Collectives: one all-gather in ``spread``.
    """

    total = None

    def __init__(self, shards: Shards) -> None:
        """Take how the matrices of the batch are cut."""
        self.members = range(len(shards.cuts))
        self._shards = shards

    def stage(self, num_tensors: int, **options: Any) -> tuple[Tensor, Slots]:
        """Room for this rank's shards."""
        return self._shards.stage(num_tensors, **options)

    def spread(self, room: Tensor, num_tensors: int) -> Tensor:
        """Whole matrices ``(num_tensors, b', m, n)``."""
        return self._shards.gather(room, num_tensors, self.members)

    def own(self, values: Tensor) -> list[Tensor]:
        """This rank's shards of them."""
        cuts = (self._shards.cuts[i] for i in self.members)
        return [cut.shard(value, self._shards.rank) for cut, value in zip(cuts, values, strict=True)]

    def share(self, values: Tensor) -> Tensor:
        """The numbers themselves: every rank has them."""
        return values


class Owner(Duplicated):
    """Each rank of the group works on its share of the batch's matrices, whole.

    In a step an ``Exchange`` brings the matrices to their owners and the results back; ``stage`` and
    ``spread`` are for looking at the matrices between steps, and gather all of them on the way.

    Collectives: one all-gather in ``spread``, one all-reduce in ``share``.
    """

    def __init__(self, shards: Shards, members: range) -> None:
        """Take how the matrices of the batch are cut, and which of them are this rank's."""
        super().__init__(shards)
        self.members = members

    def share(self, values: Tensor) -> Tensor:
        """Every owner's numbers."""
        shared = values.new_zeros(len(self._shards.cuts))
        shared[self.members.start : self.members.stop] = values
        dist.all_reduce(shared, group=self._shards.tp_group)
        return shared


class Distributed:
    """Shards stay where they are; what contracts the cut dimension is summed over the group.

    Matrices whose columns are cut are handed out transposed. Shards of unequal height are padded with
    zero rows. Collectives: one all-reduce for each call of ``total``.
    """

    def __init__(self, shards: Shards) -> None:
        """Take how the matrices of the batch are cut."""
        self.members = range(len(shards.cuts))
        self._shards = shards
        self._shapes = [cut.shard_shape(shards.rank) for cut in shards.cuts]
        self._transposes = shards.cuts[0].dim == 1

    def stage(self, num_tensors: int, **options: Any) -> tuple[Tensor, Slots]:
        """Room for the shards as they lie."""
        ranks = range(self._shards.size)
        height = max(cut.shard_shape(rank)[0] for cut in self._shards.cuts for rank in ranks)
        room = torch.zeros(num_tensors, len(self.members), height, self._shapes[0][1], **options)
        return room, [self._cropped(tensor) for tensor in room]

    def spread(self, room: Tensor, num_tensors: int) -> Tensor:
        """The shards, cut dimension first."""
        return room.mT if self._transposes else room

    def own(self, values: Tensor) -> list[Tensor]:
        """The shards as they came."""
        return self._cropped(values.mT if self._transposes else values)

    def share(self, values: Tensor) -> Tensor:
        """The numbers themselves: every rank has them."""
        return values

    def total(self, part: Tensor) -> Tensor:
        """The sum of ``part`` over the group; ``part`` may be overwritten."""
        part = part.contiguous()
        dist.all_reduce(part, group=self._shards.tp_group)
        return part

    def _cropped(self, values: Tensor) -> list[Tensor]:
        return [value[:rows] for value, (rows, _) in zip(values, self._shapes, strict=True)]


def place(mode: str, shards: Shards) -> Placement:
    """The placement that ``--spectral-tp-mode`` calls ``mode``, but for ``owner``."""
    return Duplicated(shards) if mode == "duplicated" else Distributed(shards)
