"""Plans the whole model, stage by stage, by the code that a run builds it with."""

import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sso_megatron.mcore.compat import private_api
from sso_megatron.mcore.compat.run_config import configuration, model_and_optimizer
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS
from sso_megatron.mcore.flags.parser import configs_from, group_sizes
from sso_megatron.mcore.optimizer.buffer_layout import owners
from sso_megatron.mcore.optimizer.registration import eligible, refuse_unused, register
from sso_megatron.mcore.parameters.initialization import initializer_of
from sso_megatron.mcore.parameters.layouts import ModelParameter, model_parameters
from sso_megatron.mcore.parameters.names import of_other_experts
from sso_megatron.mcore.plan.fake_world import Place, as_rank, places
from sso_megatron.mcore.plan.records import CutKind, Load, Matrix, Parameter, Plan, RankLoad
from sso_megatron.mcore.plan.request import Request
from sso_megatron.mcore.plan.stage import OptimizerRecipe, Stage, kind_of, role_of

EmbeddingRanks = Callable[[Namespace, list[int]], list[int]]


def make_plan(request: Request, embedding_ranks: EmbeddingRanks) -> Plan:
    """Build every pipeline stage as one rank of it would, and return what the optimizer does there.

    Megatron's global variables must be set, and no process group may exist.

    Args:
        request: the flags that were read.
        embedding_ranks: the script's function that returns the ranks of a pipeline with word embeddings.

    Raises:
        ValueError: a run would refuse these flags when it builds model and optimizer.
    """
    from megatron.training.training import num_floating_point_operations

    args = request.args
    config, shared = configs_from(args)
    everyone = places(args)
    surveys: list[_Survey] = []
    flops_known: dict[Any, float] = {}
    for index in range(args.pipeline_model_parallel_size):
        rank = next(rank for rank, place in enumerate(everyone) if place.stage == index)
        with as_rank(args, rank, partial(embedding_ranks, args)) as groups:
            surveys.append(_survey(request, index, everyone, groups, flops_known))
    matched = set().union(*(survey.matched for survey in surveys))
    refuse_unused(shared.exclude, matched, [name for survey in surveys for name in survey.candidates])
    workspaces = [item for survey in surveys for item in survey.workspaces.items()]
    shape, workspace = max(workspaces, key=lambda item: item[1], default=((0, 0), 0))
    return Plan(
        optimizer=args.optimizer,
        world_size=args.world_size,
        parallel=group_sizes(args),
        settings=asdict(config),
        shared=asdict(shared),
        parameters=[p for survey in surveys for p in survey.parameters],
        cuts=[cut for survey in surveys for cut in survey.cuts],
        ranks=[rank for survey in surveys for rank in survey.ranks],
        largest_shape=shape,
        largest_workspace=workspace,
        is_sharded=bool(args.use_distributed_optimizer or args.use_layer_wise_distributed_optimizer),
        model_flops=float(num_floating_point_operations(args, args.global_batch_size)),
        tokens=args.global_batch_size * args.seq_length,
        notes=request.notes,
    )


@dataclass(frozen=True)
class _Survey:
    """Holds the results of building one pipeline stage.

    Attributes:
        parameters: records of the stage's parameters.
        cuts: records of its cut matrices.
        workspaces: bytes of temporary memory by shape of a matrix.
        ranks: loads of its ranks.
        matched: patterns of ``--spectral-exclude`` that match a parameter of the stage.
        candidates: names of the parameters that the patterns may match.
    """

    parameters: list[Parameter]
    cuts: list[CutKind]
    workspaces: dict[tuple[int, int], int]
    ranks: list[RankLoad]
    matched: set[str]
    candidates: list[str]


def _survey(
    request: Request,
    index: int,
    everyone: Sequence[Place],
    groups: Any,
    flops_known: dict[Any, float],
) -> _Survey:
    args = request.args
    config, shared = configs_from(args)
    recipes: list[OptimizerRecipe] = []
    candidates: list[ModelParameter] = []
    patterns: list[str] = []

    def before_wrapping(models: list[Any]) -> list[Any]:
        # A pattern that matches on another stage alone is no error: make_plan checks all stages together.
        candidates.extend(eligible(model_parameters(models, groups), config))
        patterns.extend(s for s in shared.exclude if any(re.search(s, p.name) for p in candidates))
        register(config, replace(shared, exclude=tuple(patterns), mup_init=False))
        entry = private_api.registry()[args.optimizer]
        noting = partial(_noted, recipes, entry.optimizer_cls)
        private_api.registry()[args.optimizer] = replace(entry, optimizer_cls=noting)
        return models

    container = configuration(args)
    container.model.pre_wrap_hooks.append(before_wrapping)
    model, chain = model_and_optimizer(container, groups)
    owner = {
        param: rank
        for chunk in model
        for key, layout in (chunk.full_param_layout.layouts if chunk.full_param_layout else {}).items()
        if key.is_managed_by_layer_wise_optimizer
        for param, rank in owners(layout).items()
    }
    parameters = list(model_parameters(model, groups))
    stage = Stage(index, parameters, recipes, owner, args.optimizer, flops_known)
    adamw = _adamw_load(chain, is_mixed=args.bf16)
    dense = stage.loads(False, groups.dp_cp.size(), groups.tp.size())
    experts = stage.loads(True, groups.expt_dp.size(), groups.expt_tp.size())
    here = {place._replace(expert=0) for place in everyone if place.stage == index}
    ranks = [
        RankLoad(
            index,
            at.tensor,
            at.data,
            at.expert_tensor,
            at.expert_data,
            dense[at.data, at.tensor] + experts[at.expert_data, at.expert_tensor] + adamw,
        )
        for at in sorted(here)
    ]
    num_experts = args.num_experts or 0
    norms = _InitialNorms(args, request.starts_from_checkpoint)
    return _Survey(
        list(_parameters(stage, args, norms, patterns, groups.ep.size(), num_experts // groups.ep.size())),
        list(stage.cuts.values()),
        stage.workspaces,
        ranks,
        set(patterns),
        [p.name for p in candidates],
    )


def _noted(
    recipes: list[OptimizerRecipe], optimizer_cls: type, params: Sequence[dict[str, Any]], **settings: Any
) -> Any:
    """Return an optimizer, and append its recipe to ``recipes`` first: Megatron changes groups in place."""
    groups = [{**group, "params": list(group["params"])} for group in params]
    recipes.append(OptimizerRecipe(optimizer_cls, groups, settings))
    return optimizer_cls(params, **settings)


def _adamw_load(chain: Any, is_mixed: bool) -> Load:
    """Return what the first data-parallel rank keeps for AdamW's parameters; others keep about as much."""
    from sso_megatron.mcore.optimizer.megatron_state import state_adapters
    from sso_megatron.optimizers.base import SpectralOptimizer

    masters = state = 0
    for part in state_adapters(chain):
        if isinstance(part.inner, SpectralOptimizer):
            continue
        for param in (p for group in part.inner.param_groups for p in group["params"]):
            masters += param.numel() * 4 * is_mixed
            kept = part.inner.state[param].values()
            state += sum(t.nbytes for t in kept if isinstance(t, Tensor) and t.ndim)
    return Load(masters=masters, adamw=state)


def _parameters(
    stage: Stage,
    args: Namespace,
    norms: "_InitialNorms",
    patterns: Sequence[str],
    ep_size: int,
    num_local: int,
) -> Iterator[Parameter]:
    """Yield records of the stage's parameters; experts of other ranks differ only in their numbers."""
    spectral = {p.param for p in stage.spectral}
    for p in stage.parameters:
        role, is_spectral = role_of(p), p.param in spectral
        first = Parameter(
            name=p.name,
            stage=stage.index,
            role=role,
            shape=_whole_shape(p),
            stored=tuple(p.param.shape),
            numel=math.prod(_whole_shape(p)),
            route=args.optimizer if is_spectral else "adamw",
            reason=_reason(p, role, is_spectral, args.optimizer, patterns),
            is_expert=p.is_expert,
            is_copy=getattr(p.param, "shared", False),
            dp_owner=stage.owner.get(p.param),
            matrices=tuple(_matrices(stage, p, norms)) if is_spectral else (),
        )
        yield first
        for rank in range(1, ep_size if p.is_expert else 1):
            offset = rank * num_local
            matrices = (replace(m, name=of_other_experts(m.name, offset)) for m in first.matrices)
            name = of_other_experts(p.name, offset)
            yield replace(first, name=name, matrices=tuple(matrices))


def _matrices(stage: Stage, p: ModelParameter, norms: "_InitialNorms") -> Iterator[Matrix]:
    layout = stage.layouts(0)[p.param]
    for split, work in stage.matrices(p):
        radius, scale = stage.radius_and_scale(split.shape)
        norm = norms.of(p, split.shape, radius)
        kind = kind_of(p, split) if not p.is_vocabulary else role_of(p)
        yield Matrix(
            layout.matrix_name(split), kind, split.shape, radius, scale, norm, work.mode, work.rank
        )


class _InitialNorms:
    """Estimates the spectral norms of initial weights."""

    def __init__(self, args: Namespace, is_loaded: bool) -> None:
        """Take Megatron's arguments, and whether the initial weights are loaded from a checkpoint."""
        self._is_loaded = is_loaded
        self._is_mup = args.spectral_mup_init
        self._deviations: dict[int, float] = {}

    def of(self, p: ModelParameter, shape: tuple[int, int], radius: float | None) -> float | None:
        """Return the spectral norm to expect of a matrix's initial weights; None where they are loaded.

        It is about ``s (sqrt(m) + sqrt(n))`` for an ``m x n`` matrix of independent entries of standard
        deviation s, and ``radius`` with ``--spectral-mup-init``.
        """
        if self._is_loaded or self._is_mup:
            return None if self._is_loaded else radius
        fill = initializer_of(p)
        if id(fill) not in self._deviations:
            # No factory of torch is used: under OnMeta factories make tensors without values.
            sample = torch.tensor(0.0).expand(256, 256).clone()
            fill(sample)
            self._deviations[id(fill)] = sample.std().item()
        return self._deviations[id(fill)] * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def _whole_shape(p: ModelParameter) -> tuple[int, ...]:
    shape = list(p.param.shape)
    if p.partition_dim is not None:
        shape[p.partition_dim - 2 if p.param.ndim > 1 else 0] *= p.tp_size
    return tuple(shape)


def _reason(p: ModelParameter, role: str, is_spectral: bool, name: str, patterns: Sequence[str]) -> str:
    if is_spectral:
        return role if p.is_matrix else f"{role}: {name} takes every parameter"
    found = next((pattern for pattern in patterns if re.search(pattern, p.name)), None)
    is_eligible = p.is_matrix or OPTIMIZERS[name].prefix == "spectra_clip"
    return f"--spectral-exclude {found!r}" if found is not None and is_eligible else role
