"""Brings cut matrices to their owners and the results back, in few collectives on flat buffers."""

import torch
import torch.distributed as dist
from torch import Tensor

from sso_megatron.parallel.plan import ExchangePlan, Piece
from sso_megatron.parallel.shards import copy_all_, group_rank, group_size

Offsets = dict[Piece, int]


class Exchange:
    """Carries out an ``ExchangePlan``. In each of its rounds a step makes these calls.

    1. ``pack`` copies results of the round before into a flat buffer. The caller fills the views that it
       returns with this rank's shards of matrices that others own.
    2. ``send`` and, after other work, ``receive`` are one all-to-all, in which each piece has its exact
       size and a rank sends nothing to itself. ``receive`` returns this rank's shards of the others'
       results.
    3. ``take`` is called for each batch that this rank works on, and ``give`` with the batch's results.

    After the last round 1 and 2 are made once more.

    Collectives: one all-to-all over ``tp_group`` for each ``send``.
    """

    def __init__(
        self, plan: ExchangePlan, tp_group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take the plan, the ranks in shard order, and dtype and device of the buffers."""
        self.plan = plan
        self.num_boundaries = len(plan.rounds) + 1
        self._tp_group, self._rank, self._options = tp_group, group_rank(tp_group), (dtype, device)
        rank, ranks, boundaries = self._rank, range(group_size(tp_group)), range(self.num_boundaries)
        self._sends = [self._table([plan.parcel(b, rank, peer) for peer in ranks]) for b in boundaries]
        self._receives = [self._table([plan.parcel(b, peer, rank) for peer in ranks]) for b in boundaries]
        self._boundary = 0
        # These belong to the exchange under way; between steps they are empty and hold no memory.
        self._sent: Tensor = torch.empty(0)
        self._outgoing: dict[Piece, Tensor] = {}
        self._incoming: dict[Piece, Tensor] = {}
        self._work: dist.Work | None = None

    def _table(self, parcels: list[list[Piece]]) -> tuple[Offsets, list[int]]:
        """Return the offset of each piece in a buffer, and the number of its elements for each peer."""
        offsets: Offsets = {}
        counts, end = [], 0
        for parcel in parcels:
            start = end
            for piece in parcel:
                offsets[piece] = end
                end += self.plan.numel(piece)
            counts.append(end - start)
        return offsets, counts

    def pack(self, boundary: int) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """Make the buffer to send before round ``boundary``, or after the last.

        Returns:
            Matrices whose shards this rank sends, and the views of the buffer for the shards of their
            weights and of their directions.
        """
        self._boundary = boundary
        offsets, counts = self._sends[boundary]
        self._sent, self._outgoing = self._buffer(offsets, counts)
        results = [piece for piece in offsets if piece.what == "result"]
        # A result was put where its weight came from.
        copy_all_(self._at(results), [self._incoming[piece._replace(what="weight")] for piece in results])
        self._incoming = {}
        weights = [piece for piece in offsets if piece.what == "weight"]
        directions = [piece._replace(what="direction") for piece in weights]
        return [piece.matrix for piece in weights], self._at(weights), self._at(directions)

    def send(self) -> None:
        """Start the all-to-all; the buffer must be filled, and is not touched until ``receive``."""
        (_, sent), (offsets, received) = self._sends[self._boundary], self._receives[self._boundary]
        buffer, self._incoming = self._buffer(offsets, received)
        self._work = dist.all_to_all_single(
            buffer, self._sent, received, sent, self._tp_group, async_op=True
        )

    def receive(self) -> tuple[list[int], list[Tensor]]:
        """Wait for the all-to-all.

        Returns:
            Matrices that others worked on in the round before, and this rank's shards of the results.
        """
        assert self._work is not None
        self._work.wait()
        # At once: a thread of the backend may hold the buffer for a moment longer.
        self._sent.untyped_storage().resize_(0)
        self._work, self._sent, self._outgoing = None, torch.empty(0), {}
        results = [piece for piece in self._incoming if piece.what == "result"]
        return [piece.matrix for piece in results], [self._incoming.pop(piece) for piece in results]

    def take(self, matrices: list[int], weights: Tensor, directions: Tensor) -> None:
        """Copy the other ranks' shards of this rank's matrices into ``(b, m, n)`` tensors, in place."""
        for what, whole in (("weight", weights), ("direction", directions)):
            shards, places = self._others(what, matrices, whole)
            copy_all_(shards, places)

    def give(self, matrices: list[int], results: Tensor) -> None:
        """Store the results of this rank's matrices, ``(b, m, n)``, for the next ``pack``."""
        shards, places = self._others("weight", matrices, results)
        copy_all_(places, shards)

    def _others(self, what: str, matrices: list[int], whole: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return views of the other ranks' shards in whole matrices, and of the same shards as received."""
        shards, places = [], []
        for i, matrix in zip(matrices, whole, strict=True):
            cut = self.plan.matrices[i].cut
            for rank in range(len(cut.lengths)):
                piece = Piece(what, i, rank)
                if piece in self._incoming:
                    shards.append(cut.shard(matrix, rank))
                    places.append(self._incoming[piece])
        return shards, places

    def _at(self, pieces: list[Piece]) -> list[Tensor]:
        return [self._outgoing[piece] for piece in pieces]

    def _buffer(self, offsets: Offsets, counts: list[int]) -> tuple[Tensor, dict[Piece, Tensor]]:
        """Make a flat buffer and the views of its pieces."""
        dtype, device = self._options
        buffer = torch.empty(sum(counts), dtype=dtype, device=device)
        views = {}
        for piece, offset in offsets.items():
            shape = self.plan.matrices[piece.matrix].cut.shard_shape(piece.rank)
            views[piece] = buffer[offset : offset + self.plan.numel(piece)].view(shape)
        return buffer, views
