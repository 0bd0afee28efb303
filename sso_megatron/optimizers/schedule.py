"""The logical matrices of an optimizer's parameters in batches, and the order in which a step takes them.

The ranks of a tensor-parallel group make the same batches of cut matrices, whatever the order of their
parameters. All that communicates is sorted by parameter group and name, which ranks agree on: so ranks
that share several groups meet in all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from sso_megatron.matrices.layout import ParameterLayout, Split
from sso_megatron.optimizers.batches import MatrixBatch, Member
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.parallel.cost import PolarWork
from sso_megatron.parallel.exchange import Exchange
from sso_megatron.parallel.placement import Local, Owner, place
from sso_megatron.parallel.plan import CutMatrix, ExchangePlan, GroupPlan, Traffic, plan_group
from sso_megatron.parallel.shards import Cut, Shards, even_cut, group_rank, group_size

Order = tuple[int, tuple[Any, ...]]
"""Parameter group and name."""


class Needs(Protocol):
    """What a schedule needs to know about an algorithm's step; see ``MatrixOptimizer``.

    Attributes:
        works_on_shards: whether the step takes rows of cut matrices.
    """

    works_on_shards: bool

    def polar_work(self) -> PolarWork:
        """Return the Newton-Schulz iterations of a step on one matrix."""

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Return the temporary bytes of a step on a whole matrix."""

    def cut_workspace(self, cut: Cut, dtype: torch.dtype) -> int:
        """Return the temporary bytes of a step on the largest shard of a matrix."""

    def thin_sums(self, cut: Cut) -> tuple[int, ...] | None:
        """Return the bytes of a matrix in each all-reduce where products with it are thin, else None."""


@dataclass
class ExchangedBatches:
    """Batches whose matrices are brought to their owners, over all shapes and parameter groups.

    Attributes:
        exchange: brings the matrices.
        members: the matrices, by their places in the exchange's plan.
        rounds: batches of each round, each with the places of its ``here``.
    """

    exchange: Exchange
    members: list[Member]
    rounds: list[list[tuple[MatrixBatch, list[int]]]]


Unit = MatrixBatch | ExchangedBatches


@dataclass
class Schedule:
    """The batches of an optimizer and the order in which a step works on them.

    Attributes:
        batches: all batches; those of cut matrices are in the same order on every rank of their group.
        units: batches and exchanges in the order in which a step takes them.
        meanwhile: one list for each time that the exchanges among ``units`` send, in their order. It has
            the batches that are worked on until the data has arrived; they need no communication.
    """

    batches: list[MatrixBatch]
    units: list[Unit]
    meanwhile: list[list[MatrixBatch]]


def make_schedule(
    groups: list[dict[str, Any]],
    find_layout: Callable[[dict[str, Any], int], ParameterLayout],
    shared: SpectralConfig,
    needs: Needs,
) -> Schedule:
    """Sort all logical matrices of the groups into batches, and order the batches.

    Args:
        groups: parameter groups of the optimizer.
        find_layout: returns the layout of the parameter at a place in a group.
        shared: placement and workspace.
        needs: what the algorithm needs.
    """
    local: dict[tuple[Any, ...], list[Member]] = {}
    cut: dict[tuple[Any, ...], list[tuple[int, Member]]] = {}
    for index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            layout = find_layout(group, position)
            for split in layout.splits:
                if shared.tp_mode == "blockwise" and split.partition_dim is not None:
                    split = block_of(split, group_rank(layout.tp_group), group_size(layout.tp_group))
                member = Member(param, layout, split)
                if split.partition_dim is not None:
                    key = (id(layout.tp_group), member.dtype, param.device)
                    cut.setdefault(key, []).append((index, member))
                elif split.rows:
                    local.setdefault((index, split.shape, member.dtype, param.device), []).append(member)
    units: list[tuple[Order, Unit]] = []
    for members in cut.values():
        members.sort(key=_order)
        units += _cut_units(members, groups, shared, needs)
    exchanges = [unit.exchange for _, unit in units if isinstance(unit, ExchangedBatches)]
    workspace = shared.workspace_mib << 20
    left = min((workspace - exchange.plan.staged for exchange in exchanges), default=0)
    meanwhile: list[tuple[Order, MatrixBatch]] = []
    for (index, shape, dtype, _), matrices in local.items():
        matrices.sort(key=lambda member: member.order)
        need = needs.workspace(shape, dtype)
        # What does not fit beside matrices on their way has its own turn.
        where, size = (meanwhile, left // need) if left >= need else (units, max(1, workspace // need))
        for k in range(0, len(matrices), size):
            part = matrices[k : k + size]
            batch = MatrixBatch(part, groups[index], Local(len(part), shape), None, "local")
            where.append(((index, part[0].order), batch))
    units.sort(key=_first)
    meanwhile.sort(key=_first)
    num_waits = sum(exchange.num_boundaries for exchange in exchanges)
    waits = _spread([batch for _, batch in meanwhile], num_waits, needs.polar_work())
    batches = [batch for _, unit in units for batch in _batches_of(unit)] + [b for _, b in meanwhile]
    return Schedule(batches, [unit for _, unit in units], waits)


def _first(entry: tuple[Order, Any]) -> Order:
    return entry[0]


def _order(entry: tuple[int, Member]) -> Order:
    return entry[0], entry[1].order


def _batches_of(unit: Unit) -> list[MatrixBatch]:
    if isinstance(unit, MatrixBatch):
        return [unit]
    return [batch for batches in unit.rounds for batch, _ in batches]


def block_of(split: Split, rank: int, tp_size: int) -> Split:
    """Return a rank's shard of a cut matrix as a matrix of its own.

    Args:
        split: the cut matrix as that rank sees it.
        rank: the rank's place in the tensor-parallel group.
        tp_size: ranks of the group.
    """
    rows = sum(stop - start for start, stop in split.rows)
    columns = split.shape[1] // (tp_size if split.partition_dim == 1 else 1)
    label = f"{split.label}.block{rank}" if split.label else f"block{rank}"
    return replace(split, label=label, shape=(rows, columns), partition_dim=None, shard_rows=None)


def _cut_units(
    numbered: list[tuple[int, Member]], groups: list[dict[str, Any]], shared: SpectralConfig, needs: Needs
) -> Iterator[tuple[Order, Unit]]:
    """Yield the units of one tensor-parallel group, dtype and device.

    Args:
        numbered: the matrices, in order, each with the index of its parameter group.
        groups: parameter groups.
        shared: placement and workspace.
        needs: what the algorithm needs.
    """
    members = [member for _, member in numbered]
    dtype, tp_group = members[0].dtype, members[0].layout.tp_group
    cuts = [cut_of(member.split, group_size(tp_group)) for member in members]
    plan = _plan([index for index, _ in numbered], cuts, dtype, shared, needs)

    def shards_of(places: list[int]) -> Shards:
        return Shards([cuts[i] for i in places], tp_group)

    for mode, places in plan.batches:
        shards = shards_of(places)
        group = groups[numbered[places[0]][0]]
        batch = MatrixBatch([members[i] for i in places], group, place(mode, shards), shards, mode)
        yield _order(numbered[places[0]]), batch
    if plan.exchange is None:
        return
    rounds: list[list[tuple[MatrixBatch, list[int]]]] = []
    for batches in plan.exchange.rounds:
        rounds.append([])
        for places in batches:
            shards = shards_of(places)
            here = _owned(places, plan.exchange, shards.rank)
            group = groups[numbered[places[0]][0]]
            placement = Owner(shards, here)
            batch = MatrixBatch([members[i] for i in places], group, placement, shards, "owner")
            rounds[-1].append((batch, places[here.start : here.stop]))
    exchange = Exchange(plan.exchange, tp_group, dtype, members[0].param.device)
    yield _order(numbered[min(plan.exchange.owners)]), ExchangedBatches(exchange, members, rounds)


def cut_of(split: Split, tp_size: int) -> Cut:
    """Return how a matrix is cut whose ``partition_dim`` is not None."""
    assert split.partition_dim is not None
    if split.shard_rows is None:
        return even_cut(split.shape, split.partition_dim, tp_size)
    return Cut(split.shape, split.partition_dim, split.shard_rows)


def _plan(
    groups: Sequence[int], cuts: Sequence[Cut], dtype: torch.dtype, shared: SpectralConfig, needs: Needs
) -> GroupPlan:
    """Plan a step on matrices in order; ``groups`` has the index of each one's parameter group."""
    matrices = [
        CutMatrix(
            cut,
            kind=(index, cut.shape, cut.dim),
            itemsize=dtype.itemsize,
            workspace=needs.workspace(cut.shape, dtype),
            cut_workspace=needs.cut_workspace(cut, dtype),
            thin_sums=needs.thin_sums(cut),
            may_stay=needs.works_on_shards,
        )
        for index, cut in zip(groups, cuts, strict=True)
    ]
    return plan_group(
        matrices,
        len(cuts[0].lengths),
        mode=shared.tp_mode,
        workspace=shared.workspace_mib << 20,
        work=needs.polar_work(),
        flops_per_byte=shared.flops_per_byte,
    )


def step_traffic(
    cuts: Sequence[Cut], shared: SpectralConfig, needs: Needs, dtype: torch.dtype = torch.float32
) -> Traffic:
    """Return what a warm step moves over a tensor-parallel group, counted without that group.

    Args:
        cuts: how the matrices of one parameter group are cut, sorted by their names.
        shared: placement and workspace.
        needs: what the algorithm needs.
        dtype: dtype that the step works in.
    """
    return _plan([0] * len(cuts), cuts, dtype, shared, needs).traffic()


def _owned(places: list[int], plan: ExchangePlan, rank: int) -> range:
    """Return the range of a rank's matrices in a batch, which is sorted by owner."""
    owners = [plan.owners[i] for i in places]
    first = sum(owner < rank for owner in owners)
    return range(first, first + owners.count(rank))


def _spread(batches: list[MatrixBatch], num_waits: int, work: PolarWork) -> list[list[MatrixBatch]]:
    """Divide batches among the waits so that each has about equal work."""
    waits: list[list[MatrixBatch]] = [[] for _ in range(num_waits)]
    costs = [len(batch.members) * work.flops(batch.shape) for batch in batches]
    done, total = 0.0, sum(costs) or 1.0
    for batch, cost in zip(batches, costs, strict=True):
        waits[int((done + cost / 2) / total * num_waits)].append(batch)
        done += cost
    return waits
