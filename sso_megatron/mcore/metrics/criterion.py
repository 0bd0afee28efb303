"""Measures which weights a spectral update should help: the criterion of arXiv 2512.04299, in training.

For a weight with gradient ``G`` and incoming activations ``A``, a step of the same predicted decrease is
longer by ``gain = nr(G) / st(A)`` for a spectral update than for a Euclidean one: ``nr(G) = ||G||_*^2 /
||G||_F^2`` is the gradient's nuclear rank, ``st(A) = ||A||_F^2 / ||A||_2^2`` the activations' stable rank.
A gain above 1 speaks for the spectral update.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sso_megatron.linalg.coefficients import polar_coefficients
from sso_megatron.linalg.norms.nuclear_norm import norms
from sso_megatron.matrices.layout import ParameterLayout
from sso_megatron.mcore.flags.parser import config_from
from sso_megatron.mcore.metrics.input_stable_rank import InputStableRank
from sso_megatron.mcore.metrics.rank_gather import gather_objects
from sso_megatron.mcore.parameters.layouts import ModelParameter, has_rule, layout_of, model_parameters
from sso_megatron.optimizers.batches import Member
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.optimizers.schedule import make_schedule
from sso_megatron.parallel.cost import PolarWork
from sso_megatron.parallel.shards import Cut

# With ten steps nuclear norms came out at most 1e-3 too small for singular values that fall as 1/j^2, and
# for one of 1e4 times the others; with eight 1e-2.
_STEPS = 10

CriterionRows = dict[str, dict[str, float | None]]
"""``nuclear_rank``, ``stable_rank`` and ``gain`` by weight; None where a number is not known."""


@dataclass
class RankMeasurements:
    """The measurements of one rank at one iteration.

    Attributes:
        stable_ranks: stable rank of the activations that come into a weight, by the weight's name.
        norms: a weight's name, the kind of the matrix, and ``||G||_*`` and ``||G||_F`` of the matrix's
            gradient, by the name of the logical matrix.
    """

    stable_ranks: dict[str, float] = field(default_factory=dict)
    norms: dict[str, tuple[str, str, float, float]] = field(default_factory=dict)


def rows(parts: Iterable[RankMeasurements]) -> CriterionRows:
    """Return the criterion of every weight from the measurements of all ranks.

    Logical matrices of one kind in one weight, such as the heads' queries, make up one row: the squares of
    their norms are added, as the effects of their updates add up.
    """
    stable_ranks: dict[str, float] = {}
    gradients: dict[str, tuple[str, str, float, float]] = {}
    for part in parts:
        stable_ranks |= part.stable_ranks
        gradients |= part.norms
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for weight, kind, nuclear, frobenius in gradients.values():
        above, below = sums.get((weight, kind), (0.0, 0.0))
        sums[weight, kind] = (above + nuclear**2, below + frobenius**2)
    found: CriterionRows = {}
    for (weight, kind), (above, below) in sums.items():
        nuclear_rank = above / below if below > 0 and math.isfinite(above / below) else None
        stable_rank = stable_ranks.get(weight)
        gain = nuclear_rank / stable_rank if nuclear_rank and stable_rank else None
        found[f"{weight}.{kind}" if kind else weight] = {
            "nuclear_rank": nuclear_rank,
            "stable_rank": stable_rank,
            "gain": gain,
        }
    return found


class Criterion:
    """Measures the criterion at every ``interval``-th iteration, and does not change other iterations.

    Collectives at a measured iteration: those of ``InputStableRank``; one all-gather of each gradient
    buffer that the sharded optimizer had reduced in shards; and for each batch of matrices that tensor
    parallelism shards, an all-gather or two all-reduces. Data-parallel ranks divide the work on gradients.
    """

    def __init__(self, interval: int, shared: SpectralConfig) -> None:
        """Store the interval in iterations, and the settings by which logical matrices are found."""
        self._interval = interval
        self._shared = replace(shared, tp_mode="auto")
        self._parts: dict[int, RankMeasurements] = {}

    @classmethod
    def from_options(cls, options: Any) -> "Criterion | None":
        """Return the criterion that Megatron's arguments ask for; None if they ask for none."""
        if not options.log_spectral_criterion:
            return None
        return cls(options.log_spectral_criterion, config_from(options, "spectral"))

    def gather(self) -> dict[int, CriterionRows]:
        """Return the criterion of each iteration measured since the last call, the same on every rank.

        Collectives: one all-gather of objects over the world if an iteration was measured.
        """
        mine, self._parts = self._parts, {}
        if not mine:
            return {}
        everywhere = gather_objects(mine)
        return {iteration: rows(parts[iteration] for parts in everywhere) for iteration in mine}

    def around_train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's ``train_step`` so that forward passes and complete gradients are measured."""

        def train_step(*args: Any, iteration: int, **kwargs: Any) -> Any:
            if (iteration + 1) % self._interval:
                return original(*args, iteration=iteration, **kwargs)
            from megatron.core.process_groups_config import ProcessGroupCollection

            model, config = args[2], args[5]
            groups = ProcessGroupCollection.use_mpu_process_groups()
            is_tied = _is_tied(model)
            parameters = [p for p in model_parameters(model, groups) if _is_known(p, is_tied)]
            meter = InputStableRank([p for p in parameters if not _is_shared(p, is_tied)], groups)
            finalize = config.finalize_model_grads_func

            def finalize_and_measure(*a: Any, **k: Any) -> None:
                finalize(*a, **k)
                self._parts[iteration + 1] = RankMeasurements(
                    meter.stable_ranks(), _gradient_norms(model, parameters, self._shared, groups)
                )

            config.finalize_model_grads_func = finalize_and_measure
            try:
                return original(*args, iteration=iteration, **kwargs)
            finally:
                config.finalize_model_grads_func = finalize
                meter.close()

        return train_step


def _is_tied(model: Sequence[Any]) -> bool:
    """Return whether embedding and output layer share one weight."""
    from megatron.core.utils import unwrap_model

    return bool(getattr(unwrap_model(model[0]), "share_embeddings_and_output_weights", False))


def _is_known(p: ModelParameter, is_tied: bool) -> bool:
    # The last pipeline stage has a copy of a tied embedding, under this name.
    if is_tied and re.search(r"(^|\.)output_layer\.weight$", p.name):
        return False
    return p.param.ndim == 2 and (p.is_vocabulary or (p.is_matrix and has_rule(p)))


def _is_shared(p: ModelParameter, is_tied: bool) -> bool:
    """Return whether a weight is used in several places: tied, or in the prediction of several tokens."""
    several = is_tied or bool(p.config.mtp_num_layers)
    return several and bool(re.search(r"(^|\.)(word_embeddings|output_layer)\.weight$", p.name))


class _NuclearNorms:
    """Reports the costs of ``linalg.norms.nuclear_norm``, by which ``make_schedule`` forms batches."""

    works_on_shards = True

    def polar_work(self) -> PolarWork:
        """Return the work of one Newton-Schulz iteration of ``_STEPS`` steps for each matrix."""
        return PolarWork(1, _STEPS)

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Return the bytes of the gradient, two iterates, a product, and four squares of the short side."""
        return (4 * shape[0] * shape[1] + 4 * min(shape) ** 2) * dtype.itemsize

    def cut_workspace(self, cut: Cut, dtype: torch.dtype) -> int:
        """Return the bytes of a rank's shard of the gradient, in float64, too, and of six Gram matrices."""
        rows, columns = max(cut.lengths), cut.shape[1 - cut.dim]
        return 2 * rows * columns * dtype.itemsize + (rows * columns + 6 * columns**2) * 8

    def thin_sums(self, cut: Cut) -> None:
        """Return None, since nuclear norms need no sums of thin blocks."""
        return None


def _gradient_norms(
    model: Sequence[Any], parameters: Sequence[ModelParameter], shared: SpectralConfig, groups: Any
) -> dict[str, tuple[str, str, float, float]]:
    """Return ``RankMeasurements.norms`` for this data-parallel rank's share of the weights."""
    _gather_gradients(model)
    mine: dict[Tensor, ParameterLayout] = {}
    for is_expert, group in ((False, groups.dp_cp), (True, groups.expt_dp)):
        some = [p for p in parameters if p.is_expert == is_expert]
        mine |= {p.param: layout_of(p, shared) for p in some[group.rank() :: group.size()]}
    params = list(mine)
    schedule = make_schedule(
        [{"params": params}], lambda _, position: mine[params[position]], shared, _NuclearNorms()
    )
    coefficients = polar_coefficients("polar_express", _STEPS)
    found = {}
    for batch in schedule.batches:
        G, placement = batch.gather(_read_gradients)
        nuclear, frobenius = norms(G, coefficients, placement.all_reduce)
        values = torch.stack([nuclear, frobenius], dim=1).tolist()
        for member, (above, below) in zip(batch.members, values, strict=True):
            kind = re.sub(r"\d+$", "", member.split.label)
            found[member.name] = (member.layout.name, kind, above, below)
    return found


def _read_gradients(members: list[Member], places: list[Tensor]) -> None:
    for member, place in zip(members, places, strict=True):
        place.copy_(member.split.read(cast(Any, member.param).main_grad))


def _gather_gradients(model: Sequence[Any]) -> None:
    """Make gradients whole, in place, that were reduced in shards for the sharded optimizer."""
    for chunk in model:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buckets in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            group = buckets.intra_distributed_optimizer_instance_group
            for bucket in buckets.buckets:
                # Nothing else reads the buffer outside a rank's own shard.
                shard = bucket.grad_data.chunk(group.size())[group.rank()]
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
