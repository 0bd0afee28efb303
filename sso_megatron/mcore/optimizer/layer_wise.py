"""The sharded optimizer: data-parallel ranks own whole matrices, and AdamW's parameters are split anywhere.

This module imports Megatron, so it may only be imported when an optimizer is built.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import FP32Optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank

from sso_megatron.mcore.compat import private_api
from sso_megatron.mcore.errors import UnsupportedError
from sso_megatron.mcore.optimizer.buffer_layout import owners
from sso_megatron.mcore.optimizer.chain import SpectralChain
from sso_megatron.mcore.optimizer.param_gather import ParamGather


class SpectralLayerWiseOptimizer(LayerWiseDistributedOptimizer):
    """Wraps the spectral optimizer of the matrices that lie in this rank's shards.

    It differs from its base (Megatron-Core 0.19, ``layer_wise_optimizer.py``) in three points:

    - Experts are sharded over their own group even where the dense data-parallel group has one rank
      (TP 2, ETP 1): the base's ``shard_params`` returns early, although their gradients are
      reduce-scattered.
    - In float32 it wraps the optimizer in ``FP32Optimizer``; the base does not, and training ends with
      ``no attribute get_loss_scale``.
    - Parameters are gathered by ``ShardedChain``, not here.

    A rank may own no matrix at all; it still takes part in every collective.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        init_state_fn: Any,
        config: Any,
        model_chunks: list[Any],
        pg_collection: Any,
        grad_stats_parallel_group: Any,
    ) -> None:
        """Keep this rank's matrices of ``optimizer`` and wrap it.

        Args:
            optimizer: the torch optimizer with the matrices of all ranks.
            init_state_fn: function that makes its state.
            config: Megatron's ``OptimizerConfig``.
            model_chunks: model chunks wrapped in Megatron's DDP, with buffers laid out by ``ShardLayout``.
            pg_collection: Megatron's process groups.
            grad_stats_parallel_group: ranks that together hold every matrix exactly once.
        """
        if not config.bf16:
            optimizer = FP32Optimizer(optimizer, config, init_state_fn)
        super().__init__([optimizer], config, pg_collection, [init_state_fn], model_chunks)
        for part in (self, *self.chained_optimizers):
            part.grad_stats_parallel_group = grad_stats_parallel_group
            part.tp_group, part.expert_tp_group = pg_collection.tp, pg_collection.expt_tp

    def get_grads_for_grad_norm(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """Return the gradients that the wrapped optimizer counts; the base would read its parameters'."""
        name = private_api.grads_for_norm()
        return [g for part in self.chained_optimizers for g in getattr(part, name)(*args, **kwargs)]

    get_main_grads_for_grad_norm = get_grads_for_grad_norm  # its name in 0.18

    def shard_params(self, optimizers: list[Any], full_param_layouts: Any = None) -> None:
        """Remove the matrices of other ranks from the parameter groups, in place. No collective."""
        self.dp_cp_params_list = self.expt_dp_params_list = None  # the base's, for its own gather
        groups = self.pg_collection
        mine = {
            param
            for full in full_param_layouts
            for key, layout in full.layouts.items()
            if key.is_managed_by_layer_wise_optimizer
            for param, rank in owners(layout).items()
            if rank == get_pg_rank(groups.expt_dp if key.is_expert_parallel else groups.dp_cp)
        }
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [param for param in group["params"] if param in mine]


class ShardedChain(SpectralChain):
    """Chains spectral and AdamW optimizers, and gathers the parameters of all of them together.

    In Megatron-Core 0.19 each optimizer gathers the bucket groups that it takes for its own by their first
    bucket. From the second model chunk on (interleaved pipelines) one group holds the buckets of all
    optimizers and is gathered before the last of them has stepped: parameters stay one step behind.
    """

    def __init__(self, chained_optimizers: list[Any], model_chunks: list[Any]) -> None:
        """Chain Megatron's optimizers for this rank's model chunks, which are wrapped in Megatron's DDP."""
        super().__init__(chained_optimizers, model_chunks)
        self._adamw = [part for part in chained_optimizers if isinstance(part, DistributedOptimizer)]
        self._spectral = [part for part in chained_optimizers if part not in self._adamw]
        self._gather = ParamGather(self._spectral, self.model_chunks)
        self._has_stepped = False

    @torch.no_grad()
    def _step_parts(self) -> bool:
        """Step every optimizer, AdamW first since it is fast, and gather the parameters.

        Collectives: those of the optimizers; with ``overlap_param_gather`` no others, since the next
        forward pass gathers; else one all-gather of each bucket over its data-parallel group, most of them
        started while the spectral optimizer steps.
        """
        # The steps that the classes inherit, since their own steps would gather.
        success = all([super(DistributedOptimizer, part).step_with_ready_grads() for part in self._adamw])
        overlaps = self.config.overlap_param_gather
        if self._has_stepped and not overlaps and not any(map(_gathers_quantized, self.model_chunks)):
            with self._timed("optimizer-inner-step"):
                self._gather.step()
            with self._timed("params-all-gather"):
                self._gather.finish()
            return success
        for part in self._spectral:
            success &= super(LayerWiseDistributedOptimizer, part).step_with_ready_grads()
        self._has_stepped = True
        if not overlaps:
            with self._timed("params-all-gather"):
                for chunk in self.model_chunks:
                    chunk.start_param_sync()
        return success

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Measure the body with Megatron's timer ``name``."""
        timers = self.config.timers
        if timers is not None:
            timers(name, log_level=1).start(barrier=self.config.barrier_with_L1_time)
        yield
        if timers is not None:
            timers(name).stop()


def _gathers_quantized(chunk: Any) -> bool:
    """Return whether a chunk gathers quantized values, which are not those that its parameters hold."""
    return any(getattr(chunk.ddp_config, name, False) for name in ("fp8_param_gather", "fp4_param_gather"))


def build(config: Any, model_chunks: list[Any], config_overrides: Any, pg_collection: Any) -> ShardedChain:
    """Return the sharded optimizer of a model whose parameters were routed before DDP made its buffers.

    Megatron's own factory (0.19, ``_get_megatron_emerging_optimizer``) asserts on AdamW's experts; here
    they get a ``DistributedOptimizer`` of their own, over their own data-parallel group.

    Collectives: one gather of objects over the world.

    Args:
        config: Megatron's ``OptimizerConfig``, in which ``optimizer`` is one of ours.
        model_chunks: model chunks wrapped in Megatron's DDP.
        config_overrides: settings by parameter, as Megatron's factory takes them.
        pg_collection: Megatron's process groups.

    Raises:
        UnsupportedError: DDP's buffers are not laid out for the sharded optimizer.
    """
    if not all(map(_has_shards, model_chunks)):
        raise UnsupportedError(
            "a distributed optimizer needs shards of whole matrices in DDP's buffers: call "
            "sso_megatron.mcore.prepare_for_shards before DDP, and give DDP "
            "use_distributed_optimizer=True; or leave use_distributed_optimizer out of both"
        )
    entry = private_api.registry()[config.optimizer]
    overrides = {**(config_overrides or {}), **entry.default_param_overrides}
    groups = private_api.parameter_groups(config, model_chunks, overrides)
    process_groups = ProcessGroupCollection.setup_process_groups_for_optimizer(
        pg_collection, model_chunks, use_gloo_process_groups=False
    )
    spectral = [group for group in groups if "optimizer" not in group]
    parts: list[Any] = []
    if spectral:
        settings = entry.config_to_kwargs(config, model_chunks, pg_collection)
        parts.append(
            SpectralLayerWiseOptimizer(
                entry.optimizer_cls(spectral, **settings),
                entry.init_state_fn,
                config,
                model_chunks,
                pg_collection,
                process_groups["intra_dist_opt_group"],
            )
        )
    for is_expert in (False, True):
        own = [g for g in groups if "optimizer" in g and g["is_expert_parallel"] == is_expert]
        if own:
            parts.append(_adamw(config, model_chunks, own, process_groups, pg_collection))
    return ShardedChain(parts, model_chunks)


def _has_shards(chunk: Any) -> bool:
    is_sharded = getattr(getattr(chunk, "ddp_config", None), "use_distributed_optimizer", False)
    return is_sharded and all(
        hasattr(p, private_api.SHARDED_WHOLE) for p in chunk.parameters() if p.requires_grad
    )


def _adamw(
    config: Any,
    model_chunks: list[Any],
    groups: list[dict[str, Any]],
    process_groups: dict[str, Any],
    pg_collection: Any,
) -> Any:
    """Return Megatron's ``DistributedOptimizer`` of dense parameter groups, or of expert-parallel ones."""
    is_expert = groups[0]["is_expert_parallel"]
    own_config = copy.copy(config)
    own_config.optimizer, own_config.use_distributed_optimizer = groups[0]["optimizer"], True
    model_parallel = (
        private_api.expert_model_parallel_group(process_groups) if is_expert else process_groups["mp_group"]
    )
    optimizer = private_api.standard_optimizer(
        config=own_config,
        model_chunks=model_chunks,
        param_groups=groups,
        per_model_buffers={
            index: [b for b in _buffers(chunk, is_expert) if not _holds_matrices(b)]
            for index, chunk in enumerate(model_chunks)
        },
        model_parallel_group=model_parallel,
        data_parallel_group=process_groups["intra_expt_dp_group" if is_expert else "intra_dp_cp_group"],
        data_parallel_group_idx=get_pg_rank(model_parallel),
        intra_dist_opt_group=process_groups["intra_dist_opt_group"],
        pg_collection=pg_collection,
    )
    optimizer.config = config  # a chain insists that its optimizers share one
    return optimizer


def _buffers(chunk: Any, is_expert: bool) -> list[Any]:
    buffers: list[Any] = chunk.expert_parallel_buffers if is_expert else chunk.buffers
    return buffers


def _holds_matrices(buffer: Any) -> bool:
    return getattr(buffer.params[0], private_api.SHARDED_WHOLE)
