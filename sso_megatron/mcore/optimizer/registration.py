"""Registration of our optimizers in Megatron's factory, and preparation of models for them."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sso_megatron.matrices.layout import ParameterLayout
from sso_megatron.mcore.compat import private_api, versions
from sso_megatron.mcore.errors import UnsupportedError
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS, OptimizerSpec
from sso_megatron.mcore.optimizer.buffer_layout import ShardLayout, step_costs
from sso_megatron.mcore.parameters.initialization import initialize_by_name
from sso_megatron.mcore.parameters.layouts import LayoutTable, ModelParameter, layout_of, model_parameters
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.config import SpectralClipConfig, SpectralConfig, SSOConfig

# The tag that prepare_model, which sees global names, sets for the routing rule, which does not.
_SPECTRAL = "_is_spectral"


def register(config: Any = None, shared: SpectralConfig | None = None) -> None:
    """Enter our optimizers into Megatron's optimizer factory.

    Call it once before the optimizer is built; a later call replaces the settings. The sharded optimizer
    also needs ``prepare_for_shards`` before DDP wraps the model; Megatron's training loop calls it by
    ``model_hooks.install``.

    Args:
        config: settings of the optimizer that will be built: an ``SSOConfig``, ``SpectraConfig``,
            ``SpectralClipConfig`` or ``SpectralAdamConfig``; None for the defaults, which spectral
            clipping does not have.
        shared: settings that all spectral optimizers share; None for the defaults.

    Raises:
        UnsupportedError: megatron-core or emerging-optimizers is missing or too old, or lacks a name that
            is needed.
    """
    versions.check_versions()
    for name, spec in OPTIMIZERS.items():
        private_api.registry()[name] = private_api.registry_entry(
            spec.optimizer_cls,
            init_state_fn=lambda optimizer, config=None: optimizer.init_state(),
            config_to_kwargs=_config_to_kwargs(name),
            overrides=_overrides(),
        )
    _registered.config, _registered.shared = config, shared or SpectralConfig()
    private_api.wrap("megatron.core.optimizer:_get_megatron_emerging_optimizer", _by_our_factory)
    # Megatron's loop computes layouts by the first class, its model builders and DDP itself by the second.
    for optimizer_cls in (
        "layer_wise_optimizer:LayerWiseDistributedOptimizer",
        "distrib_optimizer:DistributedOptimizer",
    ):
        path = f"megatron.core.optimizer.{optimizer_cls}._compute_per_buffer_param_layout"
        private_api.wrap(path, _in_shards)


@dataclass
class _Registered:
    """The settings and layouts that the factory builds optimizers with, kept in this one place.

    Attributes:
        config: settings of the optimizer, from the last ``register``; None for the defaults.
        shared: settings that all spectral optimizers share; None before the first ``register``.
        find_layout: logical matrices of the model's parameters, from the last ``prepare_model``.
        shard_layout: places of whole matrices in DDP's buffers, from the last ``prepare_for_shards``.
    """

    config: Any = None
    shared: SpectralConfig | None = None
    find_layout: LayoutTable | None = None
    shard_layout: ShardLayout | None = None


_registered = _Registered()


def is_registered() -> bool:
    """Return whether ``register`` was called."""
    return _registered.shared is not None


def is_spectral(param: Tensor) -> bool:
    """Return whether ``prepare_model`` assigned the parameter to the spectral optimizer."""
    return getattr(param, _SPECTRAL, False)


def _overrides() -> dict[Any, dict[str, Any]]:
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    spectral = ParamKey(predicate=ParamPredicate(name="spectral", fn=is_spectral))
    other = ParamKey(predicate=ParamPredicate(name="not_spectral", fn=lambda p: not is_spectral(p)))
    # The matrices' own weight decay is a setting of ours; Megatron's would only show in its logs.
    return {spectral: {"wd_mult": 0.0}, other: {"optimizer": "adam"}}


def _config_to_kwargs(name: str) -> Callable[..., dict[str, Any]]:
    def build(megatron_config: Any, model_chunks: Any, pg_collection: Any) -> dict[str, Any]:
        return {
            "lr": megatron_config.lr,
            "config": _checked(name, OPTIMIZERS[name], _registered.config),
            "shared": _registered.shared,
            "find_layout": _registered.find_layout,
        }

    return build


def _checked(name: str, spec: OptimizerSpec, config: Any) -> Any:
    """Return the configuration to build ``name`` with.

    Raises:
        ValueError: ``config`` does not fit the optimizer of that name.
    """
    if config is None and not spec.fixed:
        return spec.config_cls()
    wanted = ", ".join(f"{key}={value!r}" for key, value in spec.fixed.items())
    fits = isinstance(config, spec.config_cls)
    if not fits or any(getattr(config, key) != value for key, value in spec.fixed.items()):
        raise ValueError(
            f"optimizer={name!r} was registered with {type(config).__name__}; give register() "
            f"{spec.config_cls.__name__}({wanted})"
        )
    return config


def _by_our_factory(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_megatron_emerging_optimizer(
        config: Any,
        model_chunks: list[Any],
        config_overrides: Any = None,
        pg_collection: Any = None,
    ) -> Any:
        shared = _registered.shared
        if config.optimizer not in OPTIMIZERS or shared is None:
            return original(config, model_chunks, config_overrides, pg_collection)
        from megatron.core.process_groups_config import ProcessGroupCollection

        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        # By what DDP does to gradients, and not by what the optimizer's settings say of it.
        if config.use_layer_wise_distributed_optimizer or any(map(_reduces_to_shards, model_chunks)):
            from sso_megatron.mcore.optimizer import layer_wise

            sharded = layer_wise.build(config, model_chunks, config_overrides, groups)
            _refuse_nothing(sharded.chained_optimizers)
            return sharded
        _registered.find_layout = LayoutTable(
            prepare_model(model_chunks, _registered.config, shared, groups)
        )
        chain = original(config, model_chunks, config_overrides, pg_collection)
        _refuse_nothing(chain.chained_optimizers)
        from sso_megatron.mcore.optimizer.chain import SpectralChain

        return SpectralChain(chain.chained_optimizers, model_chunks)

    return get_megatron_emerging_optimizer


def _reduces_to_shards(chunk: Any) -> bool:
    return bool(getattr(getattr(chunk, "ddp_config", None), "use_distributed_optimizer", False))


def _refuse_nothing(optimizers: Sequence[Any]) -> None:
    """Raise ValueError if no rank has a parameter to train; every rank has the groups of all."""
    if not optimizers:
        raise ValueError("all parameters of the model are frozen; leave requires_grad of some of them True")


def _in_shards(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_per_buffer_param_layout(params: list[Any], *args: Any, **kwargs: Any) -> Any:
        is_ours = params and is_spectral(params[0]) and getattr(params[0], private_api.SHARDED_WHOLE, False)
        if not is_ours or _registered.shard_layout is None:
            return original(params, *args, **kwargs)
        return _registered.shard_layout.per_buffer(params, *args, **kwargs)

    return compute_per_buffer_param_layout


def prepare_for_shards(model_chunks: Sequence[Any], pg_collection: Any) -> None:
    """Prepare a model for the sharded optimizer, before DDP makes the buffers that it shards.

    It calls ``prepare_model``, tags the parameters for DDP's buffers, and prepares the buffers' layout.
    Megatron itself routes parameters to buffers by another rule (2-D and no embedding or output layer),
    without names and exclusions: the sharded optimizer would not find its parameters in its shards.

    Collectives: those of ``prepare_model`` and ``step_costs``.

    Args:
        model_chunks: this rank's model chunks, not wrapped in DDP yet.
        pg_collection: Megatron's process groups.

    Raises:
        UnsupportedError: ``register`` was not called.
        ValueError: a parameter cannot be routed; see ``prepare_model``.
    """
    if _registered.shared is None:
        raise UnsupportedError("no spectral optimizer is registered; call register() first")
    layouts = prepare_model(model_chunks, _registered.config, _registered.shared, pg_collection)
    for chunk in model_chunks:
        for param in chunk.parameters():
            setattr(param, private_api.SHARDED_WHOLE, is_spectral(param))
    _registered.find_layout = LayoutTable(layouts)
    _registered.shard_layout = ShardLayout(step_costs(layouts))


def spectral_optimizers(optimizer: Any) -> list[SpectralOptimizer]:
    """Return the spectral optimizers inside one of Megatron's, in the same order on every rank."""
    if hasattr(optimizer, "chained_optimizers"):
        return [found for part in optimizer.chained_optimizers for found in spectral_optimizers(part)]
    inner = getattr(optimizer, "optimizer", None)
    return [inner] if isinstance(inner, SpectralOptimizer) else []


def prepare_model(
    model_chunks: Sequence[Any], config: Any, shared: SpectralConfig, pg_collection: Any
) -> list[tuple[Tensor, ParameterLayout]]:
    """Route every parameter, find the logical matrices, and draw the weights with ``mup_init``.

    Collectives: one gather of objects over the world if there are exclusion patterns; with ``mup_init``
    those of ``initialize_by_name``.

    Args:
        model_chunks: this rank's model chunks.
        config: settings of the optimizer: with those of spectral clipping, vectors and vocabularies are
            taken, too; those of SSO have the radius of the initialisation.
        shared: settings of granularity, exclusions and initialisation.
        pg_collection: Megatron's process groups.

    Returns:
        The parameters of the spectral optimizer with their layouts.

    Raises:
        ValueError: a pattern matches nothing, or no rule covers a matrix.
    """
    parameters = list(model_parameters(model_chunks, pg_collection))
    candidates = eligible(parameters, config)
    excluded = _excluded_names(candidates, shared.exclude)
    spectral = [p for p in candidates if p.name not in excluded]
    layouts = [(p.param, layout_of(p, shared)) for p in spectral]
    for p in parameters:
        setattr(p.param, _SPECTRAL, False)
    for p in spectral:
        setattr(p.param, _SPECTRAL, True)
    if shared.mup_init:
        initialize_by_name(parameters, spectral, config or SSOConfig(), shared)
    return layouts


def eligible(parameters: Iterable[ModelParameter], config: Any) -> list[ModelParameter]:
    """Return the parameters that an optimizer with settings ``config`` takes, before exclusions."""
    takes_all = isinstance(config, SpectralClipConfig)
    return [p for p in parameters if p.is_matrix or (takes_all and p.has_simple_shape)]


def _excluded_names(matrices: list[ModelParameter], patterns: tuple[str, ...]) -> set[str]:
    """Return the names that a pattern is found in.

    Collectives: one gather of objects over the world if there are patterns.

    Raises:
        ValueError: no rank has a match for a pattern.
    """
    hits = {pattern: {p.name for p in matrices if re.search(pattern, p.name)} for pattern in patterns}
    if not patterns:
        return set()
    # A pattern may match on another pipeline stage or expert-parallel rank alone.
    matched = {pattern for pattern, names in hits.items() if names}
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, matched)
    refuse_unused(patterns, set().union(*everywhere), [p.name for p in matrices])
    return set().union(*hits.values())


def refuse_unused(patterns: Iterable[str], matched: set[str], names: Iterable[str]) -> None:
    """Raise ValueError, with the names of some matrices, if a pattern is not in ``matched``."""
    unused = [pattern for pattern in patterns if pattern not in matched]
    if unused:
        known = list(names)
        more = f" and {len(known) - 3} more" if len(known) > 3 else ""
        raise ValueError(
            f"--spectral-exclude {' '.join(map(repr, unused))} matches no matrix of the model; names are "
            f"such as {', '.join(known[:3])}{more}"
        )
