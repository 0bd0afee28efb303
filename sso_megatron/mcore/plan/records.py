"""Holds the results of ``sso-megatron plan`` as plain records that can be written as JSON."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Matrix:
    """Describes a logical matrix.

    Attributes:
        name: global name.
        kind: ``q``, ``k``, ``v``, ``proj``, ``gate``, ``up``, ``down``, ``router`` and so on.
        shape: global ``(d_out, d_in)``.
        radius: radius of its sphere; None without a sphere, or where the initial weights determine it.
        scale: factor between ``lr`` times the direction and the step; None where there is no such factor.
        initial_norm: spectral norm to expect of the initial weights; None where they are loaded.
        tp_mode: ``local`` where one rank holds it whole, else the mode in which the ranks that it is cut
            over work on it.
        tp_rank: the rank of its tensor-parallel group that works on it; None where all ranks do.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    radius: float | None
    scale: float | None
    initial_norm: float | None
    tp_mode: str
    tp_rank: int | None


@dataclass(frozen=True)
class Parameter:
    """Describes a trainable parameter.

    Attributes:
        name: global name.
        stage: pipeline stage.
        role: ``matrix``, ``vector``, ``embedding``, ``output layer`` and so on.
        shape: shape of the whole parameter.
        stored: shape of one rank's shard.
        numel: number of elements of the whole parameter.
        route: ``adamw``, or the spectral optimizer's name.
        reason: why the parameter takes this route.
        is_expert: whether the experts' own data-parallel group reduces its gradient.
        is_copy: whether another stage has the same weight.
        dp_owner: data-parallel rank that alone steps on the whole parameter; None where every rank steps on
            all or a share of it.
        matrices: logical matrices of the spectral optimizer.
    """

    name: str
    stage: int
    role: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    numel: int
    route: str
    reason: str
    is_expert: bool
    is_copy: bool
    dp_owner: int | None
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True)
class CutKind:
    """Describes equal matrices that are cut over a tensor-parallel group.

    They are counted on the data-parallel rank that has most of them.

    Attributes:
        stage: pipeline stage.
        kinds: kinds of the matrices.
        shape: global ``(d_out, d_in)``.
        dim: dimension that is cut.
        tp_size: number of ranks that it is cut over.
        count: number of matrices.
        mode: mode in which they are worked on.
        why: why that mode was chosen.
        costs: cost of the step on them by mode, in flops of the busiest rank; empty where modes were not
            compared.
    """

    stage: int
    kinds: tuple[str, ...]
    shape: tuple[int, int]
    dim: int
    tp_size: int
    count: int
    mode: str
    why: str
    costs: dict[str, float]


@dataclass(frozen=True)
class Load:
    """Counts a rank's work in a step and its memory for the optimizer.

    Attributes:
        flops: flops of the matrix products of a step.
        received: bytes that the rank receives from its tensor-parallel group in a step.
        momentum: bytes of the spectral optimizer's state.
        masters: bytes of float32 copies of all parameters that the rank steps on.
        adamw: bytes of AdamW's state.
    """

    flops: float = 0.0
    received: int = 0
    momentum: int = 0
    masters: int = 0
    adamw: int = 0

    @property
    def state(self) -> int:
        """Bytes of the optimizer's state in all: momentum, float32 copies and AdamW's state."""
        return self.momentum + self.masters + self.adamw

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.flops + other.flops,
            self.received + other.received,
            self.momentum + other.momentum,
            self.masters + other.masters,
            self.adamw + other.adamw,
        )


@dataclass(frozen=True)
class RankLoad:
    """Holds the load of the ranks that share one place in the groups below.

    Attributes:
        stage: pipeline stage.
        tensor: place in the tensor-parallel group.
        data: place in the data-parallel group, context parallelism included.
        expert_tensor: place in the experts' tensor-parallel group.
        expert_data: place in the experts' data-parallel group.
        load: load of each of these ranks.
    """

    stage: int
    tensor: int
    data: int
    expert_tensor: int
    expert_data: int
    load: Load


@dataclass
class Plan:
    """Holds everything that ``sso-megatron plan`` reports of a run.

    Attributes:
        optimizer: name of the optimizer.
        world_size: number of ranks.
        parallel: sizes of the groups, by name.
        settings: settings of the optimizer.
        shared: settings that all spectral optimizers share.
        parameters: every parameter of the model.
        cuts: how cut matrices are worked on.
        ranks: loads of the ranks.
        largest_shape: shape of the matrix that takes the most temporary memory.
        largest_workspace: temporary memory that this matrix takes, in bytes.
        is_sharded: whether matrices are distributed over data-parallel ranks.
        model_flops: flops of one iteration's forward and backward passes, by Megatron's count.
        tokens: number of tokens of one iteration.
        notes: what the reader should know of how the plan was made.
        warnings: what may not be wanted, each with the way out.
    """

    optimizer: str
    world_size: int
    parallel: dict[str, int]
    settings: dict[str, Any]
    shared: dict[str, Any]
    parameters: list[Parameter]
    cuts: list[CutKind]
    ranks: list[RankLoad]
    largest_shape: tuple[int, int]
    largest_workspace: int
    is_sharded: bool
    model_flops: float
    tokens: int
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def originals(self) -> Iterator[Parameter]:
        """The model's parameters without the copies of tied weights."""
        return (p for p in self.parameters if not p.is_copy)

    @property
    def num_parameters(self) -> int:
        """Number of the model's elements, those of tied weights once."""
        return sum(p.numel for p in self.originals)

    @property
    def num_without_embeddings(self) -> int:
        """Number of the model's elements without embeddings and output layer."""
        return sum(p.numel for p in self.originals if p.role not in ("embedding", "output layer"))

    @property
    def matrix_kinds(self) -> Counter[str]:
        """Number of logical matrices by kind."""
        return Counter(m.kind for p in self.originals for m in p.matrices)

    @property
    def busiest(self) -> RankLoad:
        """The rank with most flops."""
        return max(self.ranks, key=lambda rank: rank.load.flops)

    @property
    def fullest(self) -> RankLoad:
        """The rank with the most optimizer state."""
        return max(self.ranks, key=lambda rank: rank.load.state)

    def flops_by_data_rank(self) -> list[float]:
        """Return the flops of all ranks at the busiest rank's stage and tensor-parallel place.

        They are in the order of the ranks' places in the data-parallel group.
        """
        top = self.busiest
        same = [r for r in self.ranks if (r.stage, r.tensor) == (top.stage, top.tensor)]
        return [r.load.flops for r in sorted(same, key=lambda r: r.data)]

    def imbalance(self) -> float:
        """Return the most flops in ``flops_by_data_rank``, as a multiple of their mean."""
        flops = self.flops_by_data_rank()
        mean = sum(flops) / len(flops)
        return max(flops) / mean if mean else 1.0

    def as_json(self) -> dict[str, Any]:
        """Return all fields, the totals and a version number, for JSON."""
        totals = {
            "parameters": self.num_parameters,
            "parameters_without_embeddings": self.num_without_embeddings,
            "matrices": dict(self.matrix_kinds),
            "step_flops": self.busiest.load.flops,
            "step_received_bytes": max(rank.load.received for rank in self.ranks),
            "optimizer_bytes": self.fullest.load.state,
            "imbalance": self.imbalance(),
        }
        return {"version": 1, **asdict(self), "totals": totals}
