"""Finds for one pipeline stage of a plan who works on which matrix, and what each rank has to do."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sso_megatron.matrices.layout import ParameterLayout, Split
from sso_megatron.matrices.scaling import target_radius, update_scale
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS, OptimizerSpec
from sso_megatron.mcore.optimizer.buffer_layout import is_expert_parallel
from sso_megatron.mcore.parameters.layouts import ModelParameter, layout_of
from sso_megatron.mcore.parameters.names import ROUTED_EXPERT
from sso_megatron.mcore.plan.records import CutKind, Load
from sso_megatron.mcore.plan.step_flops import StepFlops
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.batches import Member
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.optimizers.schedule import ExchangedBatches, block_of, cut_of, step_traffic
from sso_megatron.parallel.cost import mode_costs
from sso_megatron.parallel.shards import Cut


@dataclass(frozen=True)
class OptimizerRecipe:
    """Holds the arguments with which Megatron made a spectral optimizer.

    Attributes:
        optimizer_cls: the optimizer's class.
        groups: parameter groups, with the model's own parameters.
        settings: other keyword arguments.
    """

    optimizer_cls: type[SpectralOptimizer]
    groups: list[dict[str, Any]]
    settings: dict[str, Any]

    def make(
        self, takes: Callable[[Tensor], bool], layouts: dict[Tensor, ParameterLayout]
    ) -> SpectralOptimizer:
        """Return an optimizer of the parameters for which ``takes`` is true, with the given layouts."""
        groups = [{**g, "params": [p for p in g["params"] if takes(p)]} for g in self.groups]
        return self.optimizer_cls(groups, **self.settings | {"find_layout": layouts.__getitem__})


@dataclass(frozen=True)
class Work:
    """Describes who works on a logical matrix.

    Attributes:
        mode: placement mode, or ``local``.
        rank: rank of the tensor-parallel group; None where all its ranks work on the matrix.
    """

    mode: str
    rank: int | None


class Stage:
    """A pipeline stage, built once as its first rank; it says what each of its ranks would do.

    It can be used only inside ``fake_world.as_rank``.

    Attributes:
        index: the stage's place in the pipeline.
        parameters: parameters of the rank that was built.
        recipes: recipes of the spectral optimizers.
        owner: data-parallel rank by parameter; empty where matrices are not distributed.
        spec: the entry of the optimizer's name in ``OPTIMIZERS``.
        shared: settings that all spectral optimizers share.
        cuts: records of cut matrices; ``loads`` fills it.
        workspaces: bytes of temporary memory by a matrix's shape; ``loads`` fills it.
        spectral: parameters of the spectral optimizers.
    """

    def __init__(
        self,
        index: int,
        parameters: Sequence[ModelParameter],
        recipes: Sequence[OptimizerRecipe],
        owner: dict[Tensor, int],
        name: str,
        flops_known: dict[Any, float],
    ) -> None:
        """Take what was built for the stage.

        Args:
            index: the stage's place in the pipeline.
            parameters: parameters of the rank that was built.
            recipes: recipes of the spectral optimizers.
            owner: data-parallel rank by parameter; empty where matrices are not distributed over them.
            name: name of the optimizer.
            flops_known: flops counted for other stages; this stage's counts are added in place.
        """
        self.index, self.parameters, self.recipes, self.owner = index, parameters, recipes, owner
        self.spec: OptimizerSpec = OPTIMIZERS[name]
        settings = recipes[0].settings if recipes else {}
        self.shared: SpectralConfig = settings.get("shared", SpectralConfig())
        self._config: Any = settings.get("config")
        self._flops = StepFlops(recipes[0].optimizer_cls, settings, flops_known) if recipes else None
        self._layouts: dict[int, dict[Tensor, ParameterLayout]] = {}
        self._work: dict[str, Work] = {}
        self.cuts: dict[tuple[Any, ...], CutKind] = {}
        self.workspaces: dict[tuple[int, int], int] = {}
        taken = {p for recipe in recipes for group in recipe.groups for p in group["params"]}
        self.spectral = [p for p in parameters if p.param in taken]

    def layouts(self, tp_rank: int) -> dict[Tensor, ParameterLayout]:
        """Return the spectral parameters' layouts as a rank of the tensor-parallel groups sees them."""
        if tp_rank not in self._layouts:
            self._layouts[tp_rank] = {
                p.param: layout_of(replace(p, tp_rank=tp_rank if p.tp_size > 1 else 0), self.shared)
                for p in self.spectral
            }
        return self._layouts[tp_rank]

    def loads(self, is_expert: bool, num_owners: int, tp_size: int) -> dict[tuple[int, int], Load]:
        """Return the load by data-parallel and tensor-parallel rank, of dense or of experts' parameters.

        Args:
            is_expert: whether to count the experts' parameters instead of the dense ones.
            num_owners: number of data-parallel ranks for these parameters.
            tp_size: number of ranks of their tensor-parallel group.
        """
        found: dict[tuple[int, int], Load] = {}
        for data in range(num_owners):
            if data and not self.owner:
                found |= {(data, rank): found[0, rank] for rank in range(tp_size)}
                continue

            def takes(param: Tensor, data: int = data) -> bool:
                return is_expert_parallel(param) == is_expert and self.owner.get(param, data) == data

            loads = [self._loads_of(recipe, takes, tp_size) for recipe in self.recipes]
            for rank in range(tp_size):
                found[data, rank] = sum((load[rank] for load in loads), Load())
        return found

    def _loads_of(
        self, recipe: OptimizerRecipe, takes: Callable[[Tensor], bool], tp_size: int
    ) -> list[Load]:
        optimizer = recipe.make(takes, self.layouts(0))
        held = self._held(optimizer)
        flops = [0.0] * tp_size
        params = [p for group in optimizer.param_groups for p in group["params"] if p.ndim > 1]
        for rank in range(tp_size):
            for param in params:
                for split in self._local(self.layouts(rank)[param], rank, tp_size):
                    flops[rank] += self._flops_of(split.shape)
        cut = sorted(_cut_members(optimizer), key=lambda found: found[0].order)
        for member, work in cut:
            self._work[member.name] = work
            for rank in range(tp_size):
                if work.mode == "distributed":
                    assert self._flops is not None
                    flops[rank] += self._flops.shard(_cut(member), member.layout.tp_group)
                elif work.rank in (None, rank):
                    flops[rank] += self._flops_of(member.split.shape)
        received = [0] * tp_size
        for tp_group in dict.fromkeys(member.layout.tp_group for member, _ in cut):
            cuts = [_cut(member) for member, _ in cut if member.layout.tp_group is tp_group]
            for rank, num_bytes in enumerate(step_traffic(cuts, self.shared, optimizer).received):
                received[rank] += num_bytes
        self._note_cuts(cut, optimizer)
        for batch in optimizer.batches:
            if batch.mode == "distributed":
                need = optimizer.cut_workspace(_cut(batch.members[0]), torch.float32)
            else:
                need = optimizer.workspace(batch.shape, torch.float32)
            self.workspaces[batch.shape] = max(need, self.workspaces.get(batch.shape, 0))
        return [
            Load(flops[rank], received[rank], momentum=held.momentum, masters=held.masters)
            for rank in range(tp_size)
        ]

    def _held(self, optimizer: SpectralOptimizer) -> Load:
        optimizer.init_state()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        kept = (t for p in params for t in optimizer.state[p].values() if isinstance(t, Tensor))
        masters = sum(4 * p.numel() for p in params if p.dtype != torch.float32)
        return Load(momentum=sum(t.nbytes for t in kept), masters=masters)

    def _local(self, layout: ParameterLayout, rank: int, tp_size: int) -> Iterator[Split]:
        """Yield the matrices that a rank holds whole; with ``blockwise`` its shards are such, too."""
        for split in layout.splits:
            if split.partition_dim is None and split.rows:
                yield split
            elif split.partition_dim is not None and self.shared.tp_mode == "blockwise":
                yield block_of(split, rank, tp_size)

    def _flops_of(self, shape: tuple[int, int]) -> float:
        assert self._flops is not None
        return self._flops.whole(shape)

    def _note_cuts(self, cut: list[tuple[Member, Work]], optimizer: SpectralOptimizer) -> None:
        by_kind: dict[tuple[Any, ...], list[tuple[Member, Work]]] = {}
        for member, work in cut:
            key = (member.split.shape, member.split.partition_dim, member.layout.tp_group.size())
            by_kind.setdefault(key, []).append((member, work))
        names = {p.name: p for p in self.spectral}
        for key, members in by_kind.items():
            shape, _, tp_size = key
            known = self.cuts.get(key)
            if known is not None and known.count >= len(members):
                continue
            some = _cut(members[0][0])
            is_thin = optimizer.thin_sums(some) is not None
            costs: dict[str, float] = {}
            if self.shared.tp_mode == "auto" and not is_thin:
                costs = mode_costs(
                    len(members),
                    shape,
                    some.dim,
                    tp_size,
                    work=optimizer.polar_work(),
                    flops_per_byte=self.shared.flops_per_byte,
                )
                if not (some.is_long_side and optimizer.works_on_shards):
                    del costs["distributed"]
            self.cuts[key] = CutKind(
                self.index,
                tuple(dict.fromkeys(kind_of(names[m.layout.name], m.split) for m, _ in members)),
                shape,
                some.dim,
                tp_size,
                len(members),
                members[0][1].mode,
                _why(self.shared.tp_mode, members[0][1].mode, is_thin),
                costs,
            )

    def matrices(self, p: ModelParameter) -> Iterator[tuple[Split, Work]]:
        """Yield every logical matrix of a parameter, and who works on it.

        Matrices of all ranks that the parameter is cut over are included. ``loads`` must have been called
        before.
        """
        if p.param.ndim < 2:
            return
        seen = set()
        for rank in range(p.tp_size):
            layout = self.layouts(rank)[p.param]
            local = {split.label for split in self._local(layout, rank, p.tp_size)}
            if self.shared.tp_mode == "blockwise" and p.tp_size > 1:
                for split in self._local(layout, rank, p.tp_size):
                    yield split, Work("blockwise", rank)
                continue
            for split in layout.splits:
                if split.label in seen:
                    continue
                seen.add(split.label)
                if split.label in local:
                    yield split, Work("local", rank if p.partition_dim is not None else None)
                else:
                    yield split, self._work[layout.matrix_name(split)]

    def radius_and_scale(self, shape: tuple[int, int]) -> tuple[float | None, float | None]:
        """Return radius and scale of a matrix of this shape; None for what the shape does not determine.

        An optimizer without a radius or a scale has None, too.
        """
        c = self._config
        if self.spec.has_spheres:
            is_known = c.radius_mode != "from_weights"
            radius = target_radius(shape, c.radius_mode, c.radius_scaler) if is_known else None
            if radius is None and c.scale_mode == "spectral_mup":
                return None, None
            return radius, float(update_scale(shape, c.scale_mode, radius or 0.0))
        if self.spec.prefix == "spectra_clip":
            return None, float(update_scale(shape, "spectral_kaiming", 1.0))
        return None, None


def _cut(member: Member) -> Cut:
    return cut_of(member.split, member.layout.tp_group.size())


def _cut_members(optimizer: SpectralOptimizer) -> Iterator[tuple[Member, Work]]:
    for unit in optimizer.schedule.units:
        if isinstance(unit, ExchangedBatches):
            for place, owner in unit.exchange.plan.owners.items():
                yield unit.members[place], Work("owner", owner)
        elif unit.shards is not None:
            for member in unit.members:
                yield member, Work(unit.mode, None)


def _why(asked: str, mode: str, is_thin: bool) -> str:
    if asked not in (mode, "auto"):
        return f"--spectral-tp-mode {asked}, and its shorter side is cut"
    if asked != "auto":
        return f"--spectral-tp-mode {asked}"
    return "products with it are thin" if is_thin else "the cheapest, all shapes together"


_KINDS = {
    "linear_proj": "proj",
    "linear_fc1": "up",
    "linear_fc2": "down",
    "linear_qkv": "qkv",
    "word_embeddings": "embedding",
    "output_layer": "output layer",
}


def kind_of(p: ModelParameter, split: Split) -> str:
    """Return a logical matrix's kind: ``q``, ``gate``, ``router``, ``expert down``, ``shared up`` or so."""
    label = split.label.split(".block")[0].rpartition(".")[2]
    label = "" if label.startswith(("expert", "block")) else label.rstrip("0123456789")
    module = p.name.removesuffix(".weight").rpartition(".")[2]
    module = p.name.split(".")[-2] if module.startswith("weight") else module
    kind = label or _KINDS.get(module, module)
    if kind == "up" and not label and p.is_gated:
        kind = "gate and up"
    if label == "gate" and module == "linear_qkv":
        kind = "attention gate"
    if ROUTED_EXPERT.search(p.name):
        return f"expert {kind}"
    return f"shared {kind}" if ".shared_experts." in p.name and not kind.startswith("gate_") else kind


def role_of(p: ModelParameter) -> str:
    """Return a parameter's role, such as ``matrix`` or ``bias``, which its route depends on."""
    if p.name.startswith("embedding."):
        return "embedding"
    if p.is_vocabulary:
        return "output layer"
    if p.is_matrix:
        return "matrix"
    if p.name.rpartition(".")[2].startswith("bias"):
        return "bias"
    return "vector" if p.param.ndim == 1 else f"{p.param.ndim}-D tensor"
