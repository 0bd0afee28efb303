"""Every private name of Megatron's that this package relies on, in one table.

A name counts as private if it begins with an underscore, or if this package replaces what it stands for. A
new version of Megatron means reading this table, not the rest of the package; a test looks every name up in
every supported version.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sso_megatron.mcore.compat import versions
from sso_megatron.mcore.errors import UnsupportedError

SHARDED_WHOLE = "is_managed_by_layer_wise_optimizer"
"""Megatron's tag of parameters that DDP keeps in buffers of their own, one shard for each of them."""


@dataclass(frozen=True)
class PrivateName:
    """A name of Megatron's that it does not promise to keep.

    Attributes:
        use: what this package does with it, and where.
        only: the minor version in which it is used; None for all that are supported.
    """

    use: str
    only: str | None = None


_OPTIMIZER, _TRAINING = "megatron.core.optimizer", "megatron.training.training"
_ARGUMENTS, _CHECKPOINTING = "megatron.training.arguments", "megatron.training.checkpointing"
_GRAD_NORM = "megatron.core.optimizer.optimizer:MegatronOptimizer"
_ATTENTION = "megatron.core.transformer.dot_product_attention:DotProductAttention"
_LATENT = "megatron.core.transformer.multi_latent_attention"

PRIVATE_NAMES: dict[str, PrivateName] = {
    # Flags: entry
    f"{_ARGUMENTS}:add_megatron_arguments": PrivateName("wrapped: adds our flags"),
    f"{_ARGUMENTS}:validate_args": PrivateName("wrapped: our checks come first"),
    # Optimizers: optimizer/registration, model_hooks, layer_wise, chain
    f"{_OPTIMIZER}.emerging_optimizers:_EMERGING_OPTIMIZERS": PrivateName("gets our optimizers"),
    f"{_OPTIMIZER}:_get_megatron_emerging_optimizer": PrivateName("wrapped: builds our chain"),
    f"{_OPTIMIZER}:_get_param_groups": PrivateName("called: parameter groups of the sharded optimizer"),
    f"{_OPTIMIZER}:_get_megatron_optimizer_based_on_param_groups": PrivateName(
        "called: AdamW of the sharded optimizer"
    ),
    f"{_OPTIMIZER}.layer_wise_optimizer:LayerWiseDistributedOptimizer._compute_per_buffer_param_layout": (
        PrivateName("wrapped: lays whole matrices out where Megatron's loop computes buffers")
    ),
    f"{_OPTIMIZER}.distrib_optimizer:DistributedOptimizer._compute_per_buffer_param_layout": PrivateName(
        "wrapped: lays whole matrices out where model builders and DDP compute buffers"
    ),
    f"{_GRAD_NORM}.get_main_grads_for_grad_norm": PrivateName("wrapped on instances", only="0.18"),
    f"{_GRAD_NORM}.get_grads_for_grad_norm": PrivateName("wrapped on instances", only="0.19"),
    f"{_OPTIMIZER}:get_mup_config_overrides": PrivateName("wrapped: keeps muP off spectral parameters"),
    f"{_TRAINING}:get_mup_config_overrides": PrivateName("the same, by the name that the loop calls"),
    f"{_TRAINING}:tag_params_for_buffer_routing": PrivateName("wrapped: routes parameters by our rule"),
    "megatron.training.models.dist_utils:_ddp_wrap": PrivateName("wrapped: the same for model builders"),
    f"{_TRAINING}:get_model": PrivateName("wrapped: builds GPT models from a configuration", only="0.18"),
    # Records: metrics/recorder
    f"{_TRAINING}:pretrain": PrivateName("wrapped: keeps records"),
    "megatron.training:pretrain": PrivateName(
        "replaced by the wrapped one, by the name that scripts import"
    ),
    f"{_TRAINING}:train": PrivateName("wrapped: time, optimizer, run.json"),
    f"{_TRAINING}:train_step": PrivateName("wrapped: measures the step"),
    f"{_TRAINING}:training_log": PrivateName("wrapped: losses of every iteration"),
    f"{_TRAINING}:evaluate": PrivateName("wrapped: the validation loss"),
    f"{_TRAINING}:evaluate_and_print_results": PrivateName("wrapped: tells validation from test"),
    f"{_TRAINING}:checkpoint_and_decide_exit": PrivateName("wrapped: ends an unhealthy run"),
    # Checkpoints: checkpoint/save_hooks, load_hooks, compatibility
    "megatron.core.dist_checkpointing:save": PrivateName("wrapped: into a partial folder"),
    f"{_CHECKPOINTING}:open_file": PrivateName("wrapped: replaces the tracker", only="0.18"),
    "megatron.core.msc_utils:maybe_msc.open": PrivateName("wrapped: replaces the tracker", only="0.19"),
    f"{_CHECKPOINTING}:load_checkpoint": PrivateName("wrapped: all ranks end together"),
    f"{_TRAINING}:load_checkpoint": PrivateName("replaced by the wrapped one, by the name the loop calls"),
    f"{_CHECKPOINTING}:checkpoint_exists": PrivateName("wrapped: repairs the folder first"),
    f"{_CHECKPOINTING}:_load_base_checkpoint": PrivateName("wrapped: repairs the folder first"),
    f"{_CHECKPOINTING}:_get_checkpoint_format": PrivateName("wrapped: checks the files first"),
    f"{_CHECKPOINTING}:_load_global_dist_base_checkpoint": PrivateName("wrapped: checks that it fits"),
    "megatron.core.dist_checkpointing.serialization:verify_integrity_manifest": PrivateName(
        "wrapped: hashes no file twice"
    ),
    "megatron.core.dist_checkpointing.strategies.torch:_get_filesystem_reader": PrivateName(
        "called: a checkpoint's metadata"
    ),
    # Plans: plan/fake_world
    "megatron.training.initialize:_initialize_distributed": PrivateName("called: fake process groups"),
    # Without a GPU: rehearsal
    "megatron.training.initialize:_warmup_jit_function": PrivateName("replaced: nothing is compiled"),
    "megatron.core.datasets.utils:compile_helpers": PrivateName("replaced: a wheel has them compiled"),
    "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__": PrivateName(
        "wrapped: accepts sequence parallelism"
    ),
    f"{_ATTENTION}.__init__": PrivateName("wrapped: widths of latent attention, context parallelism"),
    f"{_ATTENTION}.forward": PrivateName("wrapped: context parallelism"),
    f"{_LATENT}:MLASelfAttention.__init__": PrivateName("wrapped: whole down-projections"),
    f"{_LATENT}:TELinear": PrivateName("replaced: a linear layer that every rank holds whole"),
    "megatron.core.models.backends:LocalSpecProvider.grouped_mlp_modules": PrivateName(
        "wrapped: grouped experts"
    ),
    "megatron.core.models.hybrid.hybrid_block:TENorm": PrivateName("replaced: torch's norm"),
}
"""By ``module:name``, or ``module:Class.name``."""


def existing(path: str) -> Any:
    """What a private name of Megatron's stands for.

    Args:
        path: key of ``PRIVATE_NAMES``.

    Raises:
        UnsupportedError: this Megatron-Core does not have it.
    """
    owner, name = _owner_of(path)
    return getattr(owner, name)


def replace(path: str, replacement: Any) -> None:
    """Put something else in the place of a private name.

    Args:
        path: key of ``PRIVATE_NAMES``.
        replacement: what callers find there from now on.

    Raises:
        UnsupportedError: this Megatron-Core does not have it.
    """
    owner, name = _owner_of(path)
    setattr(owner, name, replacement)


def wrap(path: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function by ``wrapper(original)``, once.

    Megatron looks these functions up in their module or class when it calls them, so that replacing
    the attribute reaches every caller.

    Args:
        path: key of ``PRIVATE_NAMES``: a module's function, or a class's static method.
        wrapper: gets the original and returns what takes its place.

    Raises:
        UnsupportedError: this Megatron-Core does not have it.
    """
    owner, name = _owner_of(path)
    original = getattr(owner, name)
    if not hasattr(original, "_sso_megatron_original"):
        replacement = wrapper(original)
        replacement._sso_megatron_original = original  # type: ignore[attr-defined]
        setattr(owner, name, staticmethod(replacement) if isinstance(owner, type) else replacement)


def _owner_of(path: str) -> tuple[Any, str]:
    """The module, class or object that holds a private name, and its last part."""
    assert path in PRIVATE_NAMES, f"{path} has no line in PRIVATE_NAMES"
    module, _, qualified = path.partition(":")
    *classes, name = qualified.split(".")
    owner = importlib.import_module(module)
    for inner in classes:
        owner = _attribute(owner, inner)
    _attribute(owner, name)
    return owner, name


def _attribute(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise UnsupportedError(
            f"{getattr(owner, '__name__', type(owner).__name__)} has no {name}: megatron-core "
            f"{versions.megatron_version()} cannot work, {', '.join(versions.MEGATRON.tested)} can; "
            f"{versions.MEGATRON.way_out}"
        )
    return getattr(owner, name)


def registry() -> dict[str, Any]:
    """Megatron's table of emerging optimizers, by the name that ``--optimizer`` takes."""
    table: dict[str, Any] = existing(f"{_OPTIMIZER}.emerging_optimizers:_EMERGING_OPTIMIZERS")
    return table


def registry_entry(
    optimizer_cls: type,
    init_state_fn: Callable[..., None],
    config_to_kwargs: Callable[..., dict[str, Any]],
    overrides: dict[Any, dict[str, Any]],
) -> Any:
    """An entry for ``registry``."""
    from megatron.core.optimizer.emerging_optimizers import EmergingOptimizerEntry

    return EmergingOptimizerEntry(
        optimizer_cls=optimizer_cls,
        init_state_fn=init_state_fn,
        config_to_kwargs=config_to_kwargs,
        default_param_overrides=overrides,
    )


def parameter_groups(
    config: Any, model_chunks: list[Any], overrides: dict[Any, Any]
) -> list[dict[str, Any]]:
    """Megatron's parameter groups of a model, the same number and order of settings on every rank.

    Collectives: one gather of objects over the world.
    """
    find: Callable[..., list[dict[str, Any]]] = existing(f"{_OPTIMIZER}:_get_param_groups")
    return find(model_chunks, config, overrides)


def standard_optimizer(**kwargs: Any) -> Any:
    """The optimizer that Megatron builds for AdamW's groups; arguments as its factory's."""
    return existing(f"{_OPTIMIZER}:_get_megatron_optimizer_based_on_param_groups")(**kwargs)


# ---------------------------------------------------------------- what 0.18 names otherwise or lacks


def tracker_opener() -> str:
    """The function that Megatron's checkpoints open their tracker file with."""
    return f"{_CHECKPOINTING}:open_file" if versions.is_0_18() else "megatron.core.msc_utils:maybe_msc.open"


def open_with_store(path: Any, *args: Any, **kwargs: Any) -> Any:
    """Open a file as Megatron does, in an object store where that is asked for."""
    from megatron.core import msc_utils

    if versions.is_0_18():
        return msc_utils.open_file(path, *args, **kwargs)
    # Asked of its class: on the object itself the function is replaced.
    return type(msc_utils.maybe_msc).__getattr__(msc_utils.maybe_msc, "open")(path, *args, **kwargs)


def grads_for_norm() -> str:
    """Name of the method that returns the gradients which an optimizer's norm is made of."""
    return "get_main_grads_for_grad_norm" if versions.is_0_18() else "get_grads_for_grad_norm"


def adamw_state_keys(optimizer: Any) -> list[str]:
    """Names of the state tensors of a ``DistributedOptimizer``; 0.18 knows AdamW's alone."""
    return ["exp_avg", "exp_avg_sq"] if versions.is_0_18() else list(optimizer.optimizer_state_keys)


def expert_model_parallel_group(process_groups: dict[str, Any]) -> Any:
    """The experts' counterpart of ``mp_group`` among an optimizer's process groups."""
    return process_groups["expt_tp_pp_group" if versions.is_0_18() else "expt_tp_pp_with_egtp_remat_group"]
