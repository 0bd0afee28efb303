"""Batches of equal logical matrices, each of which a step works on as one tensor."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sso_megatron.linalg.shard_view import ShardView
from sso_megatron.matrices.layout import ParameterLayout, Split
from sso_megatron.matrices.names import natural_order
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
        """Key to sort by name, layer 2 before layer 10."""
        return natural_order(self.name)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that a step works in: float32, or float64 for a float64 parameter."""
        return torch.promote_types(self.param.dtype, torch.float32)


@dataclass
class MatrixBatch:
    """Logical matrices of one shape, placement and parameter group, worked on as one tensor.

    Attributes:
        members: in the same order on every rank of ``tp_group``.
        group: their parameter group.
        placement: which members this rank works on, and how they get here.
        shards: how the members are cut; None when this rank holds them whole.
        mode: name of the placement, ``local`` when this rank holds the members whole.
        cache: what the algorithm keeps for this batch from step to step; None before the first step.
        stats: what the last step reported, one entry for each of ``here``; None before the first step.
        norm_basis: block that the power iteration for measured spectral norms starts from; None before the
            first measurement.
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
        """The members that this rank works on: all of them, or with ``owner`` its own."""
        return [self.members[i] for i in self.placement.members]

    @property
    def shape(self) -> tuple[int, int]:
        """Global ``(d_out, d_in)``."""
        return self.members[0].split.shape

    @property
    def shard_view(self) -> ShardView:
        """The part of its matrices that this rank works on, which is transposed where columns are cut."""
        all_reduce = self.placement.all_reduce
        if self.shards is None or all_reduce is None:
            return ShardView(self.shape)
        cut = self.shards.cuts[0]
        return ShardView(self.shape, all_reduce, sum(cut.lengths[: self.shards.rank]) if cut.dim else None)

    @property
    def options(self) -> dict[str, Any]:
        """Dtype and device that a step works in and on."""
        return {"dtype": self.members[0].dtype, "device": self.members[0].param.device}

    def read(self, stored: Iterable[Tensor]) -> list[Tensor]:
        """Return this rank's part of every member, ``(rows, columns)``, from tensors of parameter shape."""
        dtype = self.options["dtype"]
        return [m.split.read(t).to(dtype) for m, t in zip(self.members, stored, strict=True)]

    def weights(self) -> list[Tensor]:
        """Return this rank's part of every weight; it may be a view of the parameter."""
        return self.read(member.param.detach() for member in self.members)

    def gather(self, read: Callable[[list[Member], list[Tensor]], None]) -> tuple[Tensor, Placement]:
        """Bring one tensor of each member to where a step works on it, to read or change it between steps.

        Collectives: one all-gather where the members are cut, none where the placement is ``distributed``.

        Args:
            read: puts this rank's part of the members' tensors into the places given.

        Returns:
            The tensors of all members, ``(b, p, q)``, whole or this rank's part, and the placement, whose
            ``local_shards`` returns this rank's part of them. A batch of owners is gathered on every rank:
            between steps nothing would bring results back.
        """
        placement = self.placement
        if self.shards is not None and self.mode == "owner":
            placement = Duplicated(self.shards)
        buffer, (places,) = placement.allocate(1, **self.options)
        read(self.members, places)
        (spread,) = placement.gather(buffer, 1)
        return spread, placement

    def whole(self, parts: list[Tensor]) -> Tensor:
        """Return whole matrices ``(b, d_out, d_in)`` on every rank from what ``read`` returns there.

        Collectives: one all-gather where the members are cut.
        """
        if self.shards is None:
            return torch.stack(parts)
        buffer, (slots,) = self.shards.allocate(1, **self.options)
        for slot, part in zip(slots, parts, strict=True):
            slot.copy_(part)
        return self.shards.gather(buffer, 1, range(len(self.members)))[0]
