"""Access to Megatron's private names; a name that is missing raises an error that says so.

The package looks private names up only through this module. ``private_names`` has the table of them and
says what each is used for.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sso_megatron.mcore.compat import versions
from sso_megatron.mcore.compat.private_names import CHECKPOINTING, OPTIMIZER, PRIVATE_NAMES
from sso_megatron.mcore.errors import UnsupportedError

SHARDED_WHOLE = "is_managed_by_layer_wise_optimizer"
"""Megatron's tag for parameters in buffers of their own, where each lies whole in one shard."""


def existing(path: str) -> Any:
    """Return the object that a private name of Megatron's refers to.

    Args:
        path: key of ``PRIVATE_NAMES``.

    Raises:
        UnsupportedError: this Megatron-Core does not have the name.
    """
    owner, name = _holder_of(path)
    return getattr(owner, name)


def replace(path: str, replacement: Any) -> None:
    """Replace the object that a private name refers to.

    Args:
        path: key of ``PRIVATE_NAMES``.
        replacement: the object that callers find there from now on.

    Raises:
        UnsupportedError: this Megatron-Core does not have the name.
    """
    owner, name = _holder_of(path)
    setattr(owner, name, replacement)


def wrap(path: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function by ``wrapper(original)``; a function that is wrapped already stays as it is.

    Megatron looks these functions up in their module or class when it calls them, so that replacing
    the attribute reaches every caller.

    Args:
        path: key of ``PRIVATE_NAMES``: a module's function, or a class's static method.
        wrapper: takes the original and returns its replacement.

    Raises:
        UnsupportedError: this Megatron-Core does not have the name.
    """
    owner, name = _holder_of(path)
    original = getattr(owner, name)
    if not hasattr(original, "_sso_megatron_original"):
        replacement = wrapper(original)
        replacement._sso_megatron_original = original  # type: ignore[attr-defined]
        setattr(owner, name, staticmethod(replacement) if isinstance(owner, type) else replacement)


def _holder_of(path: str) -> tuple[Any, str]:
    """Return the module, class or object that holds a private name, and the name's last component."""
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
    """Return Megatron's table of emerging optimizers, by the name that ``--optimizer`` takes."""
    table: dict[str, Any] = existing(f"{OPTIMIZER}.emerging_optimizers:_EMERGING_OPTIMIZERS")
    return table


def registry_entry(
    optimizer_cls: type,
    init_state_fn: Callable[..., None],
    config_to_kwargs: Callable[..., dict[str, Any]],
    overrides: dict[Any, dict[str, Any]],
) -> Any:
    """Return an entry for the table that ``registry`` returns."""
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
    """Return Megatron's parameter groups of a model, which have the same settings and order on every rank.

    Collectives: one gather of objects over the world.
    """
    find: Callable[..., list[dict[str, Any]]] = existing(f"{OPTIMIZER}:_get_param_groups")
    return find(model_chunks, config, overrides)


def standard_optimizer(**kwargs: Any) -> Any:
    """Return the optimizer that Megatron builds for AdamW's groups; its factory takes the arguments."""
    return existing(f"{OPTIMIZER}:_get_megatron_optimizer_based_on_param_groups")(**kwargs)


def filesystem_reader(folder: Path) -> Any:
    """Return the reader of a torch_dist checkpoint that Megatron would use."""
    return existing("megatron.core.dist_checkpointing.strategies.torch:_get_filesystem_reader")(folder)


# ---------------------------------------------------------------- what 0.18 names otherwise or lacks


def tracker_opener() -> str:
    """Return the private name of the function by which Megatron's checkpoints open their tracker file."""
    return f"{CHECKPOINTING}:open_file" if versions.is_0_18() else "megatron.core.msc_utils:maybe_msc.open"


def open_with_store(path: Any, *args: Any, **kwargs: Any) -> Any:
    """Open a file as Megatron does, in an object store where Megatron is set up to use one."""
    from megatron.core import msc_utils

    if versions.is_0_18():
        return msc_utils.open_file(path, *args, **kwargs)
    # Looked up on the class, since on the object itself the function is replaced.
    return type(msc_utils.maybe_msc).__getattr__(msc_utils.maybe_msc, "open")(path, *args, **kwargs)


def grads_for_norm() -> str:
    """Return the name of the method that returns the gradients in an optimizer's gradient norm."""
    return "get_main_grads_for_grad_norm" if versions.is_0_18() else "get_grads_for_grad_norm"


def adamw_state_keys(optimizer: Any) -> list[str]:
    """Return the names of a ``DistributedOptimizer``'s state tensors; 0.18 has only those of AdamW."""
    return ["exp_avg", "exp_avg_sq"] if versions.is_0_18() else list(optimizer.optimizer_state_keys)


def expert_model_parallel_group(process_groups: dict[str, Any]) -> Any:
    """Return the experts' counterpart of ``mp_group`` among an optimizer's process groups."""
    return process_groups["expt_tp_pp_group" if versions.is_0_18() else "expt_tp_pp_with_egtp_remat_group"]
