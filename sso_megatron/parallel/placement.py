"""Which rank of a tensor-parallel group works on which part of a batch of cut matrices.

A placement takes this rank's shards of ``b`` equal matrices, hands out what this rank is to work on,
and takes back what the work made of it. What is handed out is ``(b', p, q)``: whole matrices, or this
rank's rows of matrices whose rows are cut (``q`` is always whole), and then ``total`` sums over the
ranks that hold the other rows. Everything a placement does is the same sequence of collectives on
every rank of the group.
"""

from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sso_megatron.linalg.polar import Total
from sso_megatron.parallel.shards import Shards


class Placement(Protocol):
    """See the module.

    Attributes:
        members: matrices of the batch that this rank works on, a range of places in the batch.
    """

    members: range

    @property
    def total(self) -> Total | None:
        """Sum over the ranks that hold the other rows; None where matrices are handed out whole."""

    def spread(self, shards: Tensor) -> Tensor:
        """``(k, b', p, q)`` to work on from ``(k, b, ...)`` shards: ``k`` tensors of each matrix."""

    def collect(self, values: Tensor) -> Tensor:
        """This rank's shards ``(b, ...)`` of what was worked out, ``(b', p, q)``."""


class Local:
    """Matrices that lie whole on this rank. No collectives."""

    total = None

    def __init__(self, num_matrices: int) -> None:
        """Take the size of the batch."""
        self.members = range(num_matrices)

    def spread(self, shards: Tensor) -> Tensor:
        """The matrices themselves."""
        return shards

    def collect(self, values: Tensor) -> Tensor:
        """The matrices themselves."""
        return values


class Duplicated:
    """Every rank gathers the whole matrices and does the same work.

    Collectives: one all-gather in ``spread``.
    """

    total = None

    def __init__(self, num_matrices: int, shards: Shards) -> None:
        """Take the size of the batch and how its matrices are cut."""
        self.members = range(num_matrices)
        self._shards = shards

    def spread(self, shards: Tensor) -> Tensor:
        """Whole matrices ``(k, b, m, n)``."""
        return self._shards.gather(shards)

    def collect(self, values: Tensor) -> Tensor:
        """This rank's shards of them."""
        return self._shards.cut(values)[self._shards.rank]


class Owner:
    """Each rank of the group works on its share of the batch's matrices, whole.

    Collectives: one all-to-all in ``spread`` and one in ``collect``.
    """

    total = None

    def __init__(self, num_matrices: int, shards: Shards) -> None:
        """Take the size of the batch and how its matrices are cut."""
        bounds = [num_matrices * rank // shards.size for rank in range(shards.size + 1)]
        self.members = range(bounds[shards.rank], bounds[shards.rank + 1])
        self._counts = [stop - start for start, stop in pairwise(bounds)]
        self._shards = shards

    def spread(self, shards: Tensor) -> Tensor:
        """Whole matrices ``(k, b', m, n)`` of this rank's members, from ``(k, b, ...)``."""
        sent = shards.movedim(0, 1).contiguous()  # (b, k, ...): the members of one owner together
        here = len(self.members)
        received = sent.new_empty((self._shards.size * here, *sent.shape[1:]))
        dist.all_to_all_single(
            received, sent, [here] * self._shards.size, self._counts, group=self._shards.tp_group
        )
        parts = received.unflatten(0, (self._shards.size, here))
        first = self.members.start
        return torch.stack([self._shards.join(parts[:, :, i], first) for i in range(shards.size(0))])

    def collect(self, values: Tensor) -> Tensor:
        """This rank's shards ``(b, ...)`` from every owner's matrices ``(b', m, n)``."""
        sent = self._shards.cut(values, self.members.start).flatten(0, 1).contiguous()
        received = sent.new_empty((sum(self._counts), *sent.shape[1:]))
        here = len(self.members)
        dist.all_to_all_single(
            received, sent, self._counts, [here] * self._shards.size, group=self._shards.tp_group
        )
        return received


class Distributed:
    """Shards stay where they are; what contracts the cut dimension is summed over the group.

    Matrices whose columns are cut are handed out transposed. Collectives: one all-reduce for each
    call of ``total``.
    """

    def __init__(self, num_matrices: int, shards: Shards) -> None:
        """Take the size of the batch and how its matrices are cut."""
        self.members = range(num_matrices)
        self._shards = shards

    def spread(self, shards: Tensor) -> Tensor:
        """The shards, cut dimension first."""
        return shards.mT if self._shards.partition_dim == 1 else shards

    def collect(self, values: Tensor) -> Tensor:
        """The shards as they came."""
        return values.mT if self._shards.partition_dim == 1 else values

    def total(self, part: Tensor) -> Tensor:
        """The sum of ``part`` over the group; ``part`` may be overwritten."""
        part = part.contiguous()
        dist.all_reduce(part, group=self._shards.tp_group)
        return part


PLACEMENTS: dict[str, type[Duplicated] | type[Owner] | type[Distributed]] = {
    "duplicated": Duplicated,
    "owner": Owner,
    "distributed": Distributed,
}
"""By the name that ``--spectral-tp-mode`` takes."""
