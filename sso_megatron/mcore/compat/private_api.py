"""Which Megatron-Core this works with, and every private name of it that we rely on.

A new Megatron version means reading this file, not the rest.
"""

from collections.abc import Callable
from typing import Any

from sso_megatron.mcore.compat import versions
from sso_megatron.mcore.errors import UnsupportedError

SHARDED_WHOLE = "is_managed_by_layer_wise_optimizer"
"""Megatron's tag of parameters that DDP keeps in buffers of their own, one shard for each of them."""


def registry() -> dict[str, Any]:
    """Megatron's table of emerging optimizers, by the name that ``--optimizer`` takes."""
    from megatron.core.optimizer import emerging_optimizers

    return emerging_optimizers._EMERGING_OPTIMIZERS


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


def wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` by ``wrapper(original)``, once.

    Megatron looks these functions up in their module or class when it calls them, so that replacing
    the attribute reaches every caller.

    Args:
        owner: module, or class for a static method.
        name: of the function.
        wrapper: gets the original and returns what takes its place.

    Raises:
        UnsupportedError: the function is not there.
    """
    original = existing(owner, name)
    if not hasattr(original, "_sso_megatron_original"):
        replacement = wrapper(original)
        replacement._sso_megatron_original = original  # type: ignore[attr-defined]
        setattr(owner, name, staticmethod(replacement) if isinstance(owner, type) else replacement)


def existing(owner: Any, name: str) -> Any:
    """``owner.name``, for a private name of Megatron's.

    Raises:
        UnsupportedError: it is not there.
    """
    if not hasattr(owner, name):
        raise UnsupportedError(
            f"{owner.__name__} has no {name}: megatron-core {versions.megatron_version()} cannot work, "
            f"{', '.join(versions.MEGATRON.tested)} can; {versions.MEGATRON.way_out}"
        )
    return getattr(owner, name)


def parameter_groups(
    config: Any, model_chunks: list[Any], overrides: dict[Any, Any]
) -> list[dict[str, Any]]:
    """Megatron's parameter groups of a model, the same number and order of settings on every rank.

    Collectives: one gather of objects over the world.
    """
    import megatron.core.optimizer as factory

    groups: list[dict[str, Any]] = existing(factory, "_get_param_groups")(model_chunks, config, overrides)
    return groups


def standard_optimizer(**kwargs: Any) -> Any:
    """What Megatron builds for AdamW's groups; arguments as its factory's."""
    import megatron.core.optimizer as factory

    return existing(factory, "_get_megatron_optimizer_based_on_param_groups")(**kwargs)


# ---------------------------------------------------------------- what 0.18 names otherwise or lacks


def tracker_opener() -> tuple[Any, str]:
    """Owner and name of the function that Megatron's checkpoints open their tracker file with."""
    if versions.is_0_18():
        from megatron.training import checkpointing

        return checkpointing, "open_file"
    from megatron.core.msc_utils import maybe_msc

    return maybe_msc, "open"


def open_with_store(path: Any, *args: Any, **kwargs: Any) -> Any:
    """Open a file as Megatron does, in an object store where that is asked for."""
    from megatron.core import msc_utils

    if versions.is_0_18():
        return msc_utils.open_file(path, *args, **kwargs)
    # Asked of its class: on the object itself the function is replaced.
    return type(msc_utils.maybe_msc).__getattr__(msc_utils.maybe_msc, "open")(path, *args, **kwargs)


def grads_for_norm() -> str:
    """Name of the method by which an optimizer tells the gradients that its norm is made of."""
    return "get_main_grads_for_grad_norm" if versions.is_0_18() else "get_grads_for_grad_norm"


def adamw_state_keys(optimizer: Any) -> list[str]:
    """Names of the state tensors of a ``DistributedOptimizer``; 0.18 knows AdamW's alone."""
    return ["exp_avg", "exp_avg_sq"] if versions.is_0_18() else list(optimizer.optimizer_state_keys)


def expert_model_parallel_group(process_groups: dict[str, Any]) -> Any:
    """The experts' counterpart of ``mp_group`` among an optimizer's process groups."""
    return process_groups["expt_tp_pp_group" if versions.is_0_18() else "expt_tp_pp_with_egtp_remat_group"]
