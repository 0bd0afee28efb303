"""Plans when and where each matrix of a tensor-parallel group is worked on, within a workspace.

A plan is made from shapes alone. It is the same on every rank, and can be made without any process group:
``GroupPlan.traffic`` counts what a step will move.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sso_megatron.parallel.cost import (
    PolarWork,
    all_reduced,
    assign_owners,
    mode_costs,
    owner_cost,
    summed_bytes,
)
from sso_megatron.parallel.shards import Cut, Shards

# Part of the workspace that matrices on their way may take; the rest is for matrices that a rank holds
# whole and works on meanwhile.
_STAGED = 7 / 8
# What an exchange between two rounds puts into the workspace of each crossing matrix: weight, direction
# and result, both of those that come and of those that leave.
_COPIES = 6


@dataclass(frozen=True)
class CutMatrix:
    """What a plan needs to know about a matrix.

    Attributes:
        cut: global shape and shards.
        kind: matrices of one kind may be worked on in one batch.
        itemsize: bytes of a number.
        workspace: bytes that a step on the whole matrix takes, weight and direction included.
        cut_workspace: bytes that a step on its largest shard takes, weight and direction included.
        thin_sums: bytes in each all-reduce of a step, for algorithms whose products with the matrix are
            thin; None for others.
        may_stay: whether the algorithm works on shards; otherwise ``auto`` always brings them together.
    """

    cut: Cut
    kind: Hashable
    itemsize: int
    workspace: int
    cut_workspace: int
    thin_sums: tuple[int, ...] | None = None
    may_stay: bool = True


class Piece(NamedTuple):
    """A shard on its way between two ranks.

    Attributes:
        what: ``weight`` or ``direction`` on the way to the owner, ``result`` on the way back.
        matrix: place of the matrix in the plan's list.
        rank: rank that holds the shard.
    """

    what: str
    matrix: int
    rank: int


class Traffic(NamedTuple):
    """What a warm step moves over one tensor-parallel group.

    Attributes:
        num_collectives: number of collectives.
        received: bytes that each rank receives from others.
    """

    num_collectives: int
    received: list[int]


@dataclass(frozen=True)
class ExchangePlan:
    """Rounds in which matrices go to their owners, and back.

    There is one exchange of data before each round and one after the last. An exchange between two rounds
    carries the results of the first and the inputs of the second.

    Attributes:
        matrices: all matrices of the group, those in other modes included.
        owners: rank that works on a matrix, by the matrix's place in ``matrices``.
        rounds: batches of each round; each batch lists matrices, sorted by owner.
        staged: bytes of matrices on their way that a rank holds at most.
    """

    matrices: Sequence[CutMatrix]
    owners: dict[int, int]
    rounds: list[list[list[int]]]
    staged: int

    def parcel(self, boundary: int, sender: int, receiver: int) -> list[Piece]:
        """Return the pieces that one rank sends to another before round ``boundary``, in order."""
        if sender == receiver:
            return []
        done = [i for batch in self.rounds[boundary - 1] for i in batch] if boundary else []
        pieces = [Piece("result", i, receiver) for i in done if self.owners[i] == sender]
        if boundary < len(self.rounds):
            due = [i for batch in self.rounds[boundary] for i in batch if self.owners[i] == receiver]
            pieces += [Piece(what, i, sender) for i in due for what in ("weight", "direction")]
        return [piece for piece in pieces if self.numel(piece)]

    def numel(self, piece: Piece) -> int:
        """Return the number of elements of a piece."""
        return self.matrices[piece.matrix].cut.numel(piece.rank)


@dataclass(frozen=True)
class GroupPlan:
    """A step on all cut matrices of a group.

    Attributes:
        matrices: the matrices in the order in which they should be finished.
        exchange: plan for the matrices whose mode is ``owner``, if there are any.
        batches: mode and matrices of each batch in another mode.
        num_ranks: ranks of the group.
    """

    matrices: Sequence[CutMatrix]
    exchange: ExchangePlan | None
    batches: list[tuple[str, list[int]]]
    num_ranks: int

    def traffic(self) -> Traffic:
        """Return the collectives of a warm step, and the bytes that each rank receives."""
        ranks = range(self.num_ranks)
        num_collectives, received = 0, [0] * self.num_ranks
        if self.exchange is not None:
            num_collectives = len(self.exchange.rounds) + 1
            itemsize = self.matrices[0].itemsize
            for boundary in range(num_collectives):
                for sender, receiver in ((a, b) for a in ranks for b in ranks):
                    pieces = self.exchange.parcel(boundary, sender, receiver)
                    received[receiver] += itemsize * sum(map(self.exchange.numel, pieces))
        for mode, members in self.batches:
            cuts = [self.matrices[i].cut for i in members]
            if mode == "duplicated":
                num_collectives += 1
                numel = 2 * Shards.padded_numel(cuts, self.num_ranks)
                num_bytes = (self.num_ranks - 1) * numel * self.matrices[0].itemsize
            else:
                sums = self.matrices[members[0]].thin_sums
                sums = sums or summed_bytes(cuts[0].shape[1 - cuts[0].dim])
                num_collectives += len(sums)
                num_bytes = int(all_reduced(len(cuts) * sum(sums), self.num_ranks))
            received = [number + num_bytes for number in received]
        return Traffic(num_collectives, received)


def plan_group(
    matrices: Sequence[CutMatrix],
    num_ranks: int,
    *,
    mode: str,
    workspace: int,
    work: PolarWork,
    flops_per_byte: float,
) -> GroupPlan:
    """Plan a step on all cut matrices of a group that have one dtype.

    Args:
        matrices: the matrices in the order in which they should be finished.
        num_ranks: ranks of the group.
        mode: ``duplicated``, ``distributed``, ``owner`` or ``auto``. A matrix whose shorter side is cut
            goes to an owner where others are ``distributed``: the Gram matrix would be larger than it is.
            Where products are thin, ``distributed`` and ``auto`` leave all shards where they are.
        workspace: bytes of temporary memory. A matrix that does not fit is worked on all the same, alone.
        work: Newton-Schulz iterations a step, for costs.
        flops_per_byte: flops in the time of one byte between ranks.
    """
    kinds: dict[Hashable, list[int]] = {}
    for i, matrix in enumerate(matrices):
        kinds.setdefault(matrix.kind, []).append(i)
    modes = dict.fromkeys(kinds, mode)
    if mode in ("auto", "distributed") and all(matrix.thin_sums and matrix.may_stay for matrix in matrices):
        modes = dict.fromkeys(kinds, "distributed")
    elif mode == "distributed":
        modes = {
            kind: "distributed" if matrices[members[0]].cut.is_long_side else "owner"
            for kind, members in kinds.items()
        }
    elif mode == "auto":
        modes = _choose_modes(matrices, kinds, num_ranks, work, flops_per_byte)
    batches = []
    for kind, members in kinds.items():
        if modes[kind] != "owner":
            size = max(1, workspace // max(_bytes_of_one(matrices[i], modes[kind]) for i in members))
            batches += [(modes[kind], members[k : k + size]) for k in range(0, len(members), size)]
    owned = [i for i, matrix in enumerate(matrices) if modes[matrix.kind] == "owner"]
    exchange = _plan_exchange(matrices, owned, num_ranks, workspace, work) if owned else None
    return GroupPlan(matrices, exchange, batches, num_ranks)


def _bytes_of_one(matrix: CutMatrix, mode: str) -> int:
    if mode == "distributed":
        return matrix.cut_workspace
    # While they are gathered: the shards that are sent, all that is received, and the whole matrices.
    numel = matrix.cut.shape[0] * matrix.cut.shape[1]
    return max(matrix.workspace, matrix.itemsize * (4 * numel + 2 * _largest_shard(matrix.cut)))


def _largest_shard(cut: Cut) -> int:
    return max(map(cut.numel, range(len(cut.lengths))))


def _choose_modes(
    matrices: Sequence[CutMatrix],
    kinds: dict[Hashable, list[int]],
    num_ranks: int,
    work: PolarWork,
    flops_per_byte: float,
) -> dict[Hashable, str]:
    """Choose a mode for each kind: ``owner``, unless taking the kind out makes the step cheaper."""
    modes = dict.fromkeys(kinds, "owner")

    def cost_of_owners() -> float:
        cuts = [matrix.cut for matrix in matrices if modes[matrix.kind] == "owner"]
        return owner_cost(cuts, num_ranks, work=work, flops_per_byte=flops_per_byte)

    for kind, members in kinds.items():
        matrix = matrices[members[0]]
        cut = matrix.cut
        costs = mode_costs(
            len(members), cut.shape, cut.dim, num_ranks, work=work, flops_per_byte=flops_per_byte
        )
        with_it = cost_of_owners()
        stays = cut.is_long_side and matrix.may_stay
        others = ("duplicated", "distributed") if stays else ("duplicated",)
        modes[kind] = min(others, key=costs.__getitem__)
        if cost_of_owners() + costs[modes[kind]] >= with_it:
            modes[kind] = "owner"
    return modes


def _plan_exchange(
    matrices: Sequence[CutMatrix], owned: list[int], num_ranks: int, workspace: int, work: PolarWork
) -> ExchangePlan:
    costs = [work.flops(matrices[i].cut.shape) for i in owned]
    owners = dict(zip(owned, assign_owners(costs, num_ranks), strict=True))
    rows = _rows(matrices, owners)
    itemsize = matrices[owned[0]].itemsize
    loads = [_crossing(matrices, owners, row, num_ranks) for row in rows]
    # Half of what is staged is there while a matrix is worked on.
    most = max(matrices[i].workspace for i in owned)
    limit = min(_STAGED * workspace, 2 * (workspace - most)) / (_COPIES * itemsize)
    fewest = len(_pack(loads, limit))
    # As many rounds, but as even as they can be.
    rounds = next(even for k in range(1, 65) if len(even := _pack(loads, limit * k / 64)) == fewest)
    peaks = [max(column) for column in zip(*(_sum(loads[k] for k in row) for row in rounds), strict=True)]
    coming, leaving = itemsize * max(peaks[:num_ranks]), itemsize * max(peaks[num_ranks:])
    planned = []
    for places in rounds:
        by_kind: dict[Hashable, list[list[int]]] = {}
        for k in places:
            by_kind.setdefault(matrices[rows[k][0]].kind, []).append(rows[k])
        batches = []
        for same in by_kind.values():
            need = max(matrices[i].workspace for row in same for i in row)
            size = max(1, (workspace - 2 * coming - leaving) // need)
            for k in range(0, len(same), size):
                members = [i for row in same[k : k + size] for i in row]
                batches.append(sorted(members, key=lambda i: (owners[i], i)))
        planned.append(batches)
    return ExchangePlan(matrices, owners, planned, staged=3 * (coming + leaving))


def _rows(matrices: Sequence[CutMatrix], owners: dict[int, int]) -> list[list[int]]:
    """Return rows of matrices of one kind with different owners, which work on a row at the same time."""
    rows: dict[tuple[Hashable, int], list[int]] = {}
    counts: dict[tuple[Hashable, int], int] = {}
    for i, owner in owners.items():
        kind = matrices[i].kind
        place = counts[kind, owner] = counts.get((kind, owner), -1) + 1
        rows.setdefault((kind, place), []).append(i)
    return list(rows.values())


def _crossing(
    matrices: Sequence[CutMatrix], owners: dict[int, int], row: list[int], num_ranks: int
) -> list[int]:
    """Return the elements of a row that each rank receives as owner, then those that each rank sends."""
    loads = [0] * (2 * num_ranks)
    for i in row:
        for rank in range(num_ranks):
            if rank != owners[i]:
                loads[owners[i]] += matrices[i].cut.numel(rank)
                loads[num_ranks + rank] += matrices[i].cut.numel(rank)
    return loads


def _pack(loads: list[list[int]], limit: float) -> list[list[int]]:
    """Return rounds of neighbouring rows; only a round of one row may exceed the limit on a rank."""
    rounds: list[list[int]] = []
    load: list[int] = []
    for k, more in enumerate(loads):
        both = _sum([load, more]) if rounds else more
        if rounds and max(both) <= limit:
            rounds[-1].append(k)
            load = both
        else:
            rounds.append([k])
            load = more
    return rounds


def _sum(loads: Iterable[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*loads, strict=True)]
