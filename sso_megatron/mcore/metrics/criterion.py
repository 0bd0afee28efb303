"""Which weights a spectral update should help: the criterion of arXiv 2512.04299, during training.

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
from sso_megatron.linalg.nuclear_norm import norms
from sso_megatron.matrices.layout import ParameterLayout
from sso_megatron.mcore.metrics.input_stable_rank import InputStableRank
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
"""Of each weight: ``nuclear_rank``, ``stable_rank`` and ``gain``; None where it is not known."""


@dataclass
class RankMeasurements:
    """What a rank knows of a step.

    Attributes:
        stable_ranks: of the activations that come into a weight, by its name.
        norms: of each logical matrix's gradient, by its name: the weight, which kind of matrix it is, and
            ``||G||_*`` and ``||G||_F``.
    """

    stable_ranks: dict[str, float] = field(default_factory=dict)
    norms: dict[str, tuple[str, str, float, float]] = field(default_factory=dict)


def rows(parts: Iterable[RankMeasurements]) -> CriterionRows:
    """The criterion of every weight, from all ranks' parts.

    Logical matrices of one kind in one weight, such as the heads' queries, make up one row: the norms'
    squares add up, as the updates' effects do.
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
    """Measures every so many iterations.

    Collectives at such an iteration: those of ``ActivationMeter``; one all-gather of each gradient buffer
    that the sharded optimizer had reduced in shards; and of each batch of matrices that tensor parallelism
    cuts an all-gather or two all-reduces. The gradients' work is shared out over data-parallel ranks.
    """

    def __init__(self, interval: int, shared: SpectralConfig) -> None:
        """Take the number of iterations and how matrices are found."""
        self._interval = interval
        self._shared = replace(shared, tp_mode="auto")
        self._parts: dict[int, RankMeasurements] = {}

    def take(self) -> dict[int, RankMeasurements]:
        """This rank's part of what was measured since the last call, by iteration."""
        parts, self._parts = self._parts, {}
        return parts

    def around_train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Look on at the forward passes, and at the gradients when they are complete."""

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
    """Whether embedding and output layer are one weight."""
    from megatron.core.utils import unwrap_model

    return bool(getattr(unwrap_model(model[0]), "share_embeddings_and_output_weights", False))


def _is_known(p: ModelParameter, is_tied: bool) -> bool:
    # The last pipeline stage has a copy of a tied embedding, under this name.
    if is_tied and re.search(r"(^|\.)output_layer\.weight$", p.name):
        return False
    return p.param.ndim == 2 and (p.is_vocabulary or (p.is_matrix and has_rule(p)))


def _is_shared(p: ModelParameter, is_tied: bool) -> bool:
    """Whether a weight is used in several places: a tied embedding, or one that predicts several tokens."""
    several = is_tied or bool(p.config.mtp_num_layers)
    return several and bool(re.search(r"(^|\.)(word_embeddings|output_layer)\.weight$", p.name))


class _NuclearNorms:
    """What ``make_schedule`` needs to know of ``linalg.nuclear_norm``."""

    works_on_shards = True

    def polar_work(self) -> PolarWork:
        return PolarWork(1, _STEPS)

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Gradient, two iterates and a product, and squares of the short side."""
        return (4 * shape[0] * shape[1] + 4 * min(shape) ** 2) * dtype.itemsize

    def cut_workspace(self, cut: Cut, dtype: torch.dtype) -> int:
        """Gradient, in float64 too, and squares."""
        rows, columns = max(cut.lengths), cut.shape[1 - cut.dim]
        return 2 * rows * columns * dtype.itemsize + (rows * columns + 6 * columns**2) * 8

    def thin_sums(self, cut: Cut) -> None:
        return None


def _gradient_norms(
    model: Sequence[Any], parameters: Sequence[ModelParameter], shared: SpectralConfig, groups: Any
) -> dict[str, tuple[str, str, float, float]]:
    """See ``Part.norms``; of this data-parallel rank's share of the weights."""
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
    """Put the shards that the sharded optimizer's gradients were reduced in together, in place."""
    for chunk in model:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buckets in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            group = buckets.intra_distributed_optimizer_instance_group
            for bucket in buckets.buckets:
                # Nobody else reads what lies outside a rank's shard.
                shard = bucket.grad_data.chunk(group.size())[group.rank()]
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
