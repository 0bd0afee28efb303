"""Which rank of a tensor-parallel group works on which part of a batch of cut matrices.

A placement takes this rank's shards of ``b`` equal matrices, hands out what this rank is to work on,
and takes back what the work made of it. What is handed out is ``(b', p, q)``: whole matrices, or this
rank's rows of matrices whose rows are cut (``q`` is always whole), and then ``total`` sums over the
ranks that hold the other rows. Everything a placement does is the same sequence of collectives on
every rank of the group.
"""

from typing import Protocol

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

    def share(self, values: Tensor) -> Tensor:
        """``(b,)`` numbers on every rank from one for each of ``members``, ``(b',)``."""


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

    def share(self, values: Tensor) -> Tensor:
        """The numbers themselves."""
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
        return self._shards.own(values)

    def share(self, values: Tensor) -> Tensor:
        """The numbers themselves: every rank has them."""
        return values


class Owner:
    """Each rank of the group works on its share of the batch's matrices, whole.

    Collectives: one all-to-all in ``spread``, one in ``collect``, one all-reduce in ``share``.
    """

    total = None

    def __init__(self, num_matrices: int, shards: Shards, first_owner: int = 0) -> None:
        """Take the size of the batch, how its matrices are cut, and who is first to own one more."""
        share, rest = divmod(num_matrices, shards.size)
        self._counts = [share + ((rank - first_owner) % shards.size < rest) for rank in range(shards.size)]
        first = sum(self._counts[: shards.rank])
        self.members = range(first, first + self._counts[shards.rank])
        self._shards = shards

    def spread(self, shards: Tensor) -> Tensor:
        """Whole matrices ``(k, b', m, n)`` of this rank's members, from ``(k, b, ...)``."""
        sent = shards.movedim(0, 1).contiguous()  # (b, k, ...): the members of one owner together
        received = self._exchange(sent, self._counts, [len(self.members)] * self._shards.size)
        parts = received.unflatten(0, (self._shards.size, len(self.members)))
        return self._shards.join(parts.movedim(2, 1), self.members.start)

    def collect(self, values: Tensor) -> Tensor:
        """This rank's shards ``(b, ...)`` from every owner's matrices ``(b', m, n)``."""
        sent = self._shards.cut(values, self.members.start).flatten(0, 1).contiguous()
        return self._exchange(sent, [len(self.members)] * self._shards.size, self._counts)

    def share(self, values: Tensor) -> Tensor:
        """Every owner's numbers."""
        shared = values.new_zeros(sum(self._counts))
        shared[self.members.start : self.members.stop] = values
        dist.all_reduce(shared, group=self._shards.tp_group)
        return shared

    def _exchange(self, sent: Tensor, to_each: list[int], from_each: list[int]) -> Tensor:
        received = sent.new_empty((sum(from_each), *sent.shape[1:]))
        dist.all_to_all_single(received, sent, from_each, to_each, group=self._shards.tp_group)
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

    def share(self, values: Tensor) -> Tensor:
        """The numbers themselves: every rank has them."""
        return values

    def total(self, part: Tensor) -> Tensor:
        """The sum of ``part`` over the group; ``part`` may be overwritten."""
        part = part.contiguous()
        dist.all_reduce(part, group=self._shards.tp_group)
        return part


def place(mode: str, num_matrices: int, shards: Shards, first_owner: int = 0) -> Placement:
    """The placement that ``--spectral-tp-mode`` calls ``mode``."""
    if mode == "owner":
        return Owner(num_matrices, shards, first_owner)
    if mode == "duplicated":
        return Duplicated(num_matrices, shards)
    return Distributed(num_matrices, shards)
