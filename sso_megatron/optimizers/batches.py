"""Batches of equal logical matrices: what a step works on in one go."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sso_megatron.linalg.shard_view import ShardView
from sso_megatron.matrices.layout import ParameterLayout, Split
from sso_megatron.parallel.placement import Duplicated, Placement
from sso_megatron.parallel.shards import Shards


@dataclass(frozen=True)
class Member:
    """One logical matrix of a batch."""

    param: Tensor
    layout: ParameterLayout
    split: Split

    @property
    def name(self) -> str:
        """Global name of the logical matrix."""
        return self.layout.matrix_name(self.split)

    @property
    def order(self) -> tuple[Any, ...]:
        """To sort by name, layer 2 before layer 10."""
        return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", self.name))

    @property
    def dtype(self) -> torch.dtype:
        """What it is worked on in: float32, or float64 for a float64 parameter."""
        return torch.promote_types(self.param.dtype, torch.float32)


@dataclass
class MatrixBatch:
    """Logical matrices of one shape, placement and parameter group, worked on in one go.

    Attributes:
        members: in the same order on every rank of ``tp_group``.
        group: their parameter group.
        placement: which of them this rank works on, and how they get there.
        shards: how they are cut; None when they lie whole on this rank.
        mode: name of the placement, ``local`` when they lie whole on this rank.
        cache: what the algorithm keeps for this batch from step to step; None before the first.
        stats: what the last step reported, one entry for each of ``here``; None before the first.
        norm_basis: from which spectral norms are found again where steps do not find them.
    """

    members: list[Member]
    group: dict[str, Any]
    placement: Placement
    shards: Shards | None
    mode: str
    cache: Any = None
    stats: Any = field(default=None, repr=False)
    norm_basis: torch.Tensor | None = field(default=None, repr=False)

    @property
    def here(self) -> list[Member]:
        """The members that this rank works on: all but for ``owner``."""
        return [self.members[i] for i in self.placement.members]

    @property
    def shape(self) -> tuple[int, int]:
        """Global ``(d_out, d_in)``."""
        return self.members[0].split.shape

    @property
    def shard_view(self) -> ShardView:
        """Which part of its matrices this rank works on. Columns that are cut are handed out as rows."""
        all_reduce = self.placement.all_reduce
        if self.shards is None or all_reduce is None:
            return ShardView(self.shape)
        cut = self.shards.cuts[0]
        return ShardView(self.shape, all_reduce, sum(cut.lengths[: self.shards.rank]) if cut.dim else None)

    @property
    def options(self) -> dict[str, Any]:
        """Dtype and device of what is worked on."""
        return {"dtype": self.members[0].dtype, "device": self.members[0].param.device}

    def read(self, stored: Iterable[Tensor]) -> list[Tensor]:
        """This rank's part of every member, ``(rows, columns)``, from tensors of parameter shape."""
        dtype = self.options["dtype"]
        return [m.split.read(t).to(dtype) for m, t in zip(self.members, stored, strict=True)]

    def weights(self) -> list[Tensor]:
        """This rank's part of every weight; it may be a view of the parameter."""
        return self.read(member.param.detach() for member in self.members)

    def gather(self, read: Callable[[list[Member], list[Tensor]], None]) -> tuple[Tensor, Placement]:
        """A tensor of each member, spread as for a step, for looking at it or changing it between steps.

        Collectives: one all-gather where the members are cut, none where the placement is ``distributed``.

        Args:
            read: puts this rank's part of the members' tensors into the places given.

        Returns:
            ``(b, p, q)``, whole or parts, of all members: between steps nothing brings results back from
            owners. And the placement, whose ``local_shards`` gives this rank's part back.
        """
        placement = self.placement
        if self.shards is not None and self.mode == "owner":
            placement = Duplicated(self.shards)
        buffer, (places,) = placement.allocate(1, **self.options)
        read(self.members, places)
        (spread,) = placement.gather(buffer, 1)
        return spread, placement

    def whole(self, parts: list[Tensor]) -> Tensor:
        """Whole matrices ``(b, d_out, d_in)`` on every rank, from what ``read`` gives; for looking at.

        Collectives: one all-gather where the members are cut.
        """
        if self.shards is None:
            return torch.stack(parts)
        buffer, (slots,) = self.shards.allocate(1, **self.options)
        for slot, part in zip(slots, parts, strict=True):
            slot.copy_(part)
        return self.shards.gather(buffer, 1, range(len(self.members)))[0]
