"""Which Megatron-Core this works with, and every private name of it that we rely on.

A new Megatron version means reading this file, not the rest.
"""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHARDED_WHOLE = "is_managed_by_layer_wise_optimizer"
"""Megatron's tag of parameters that DDP keeps in buffers of their own, one shard for each of them."""

OPTIONAL_STATE = "optimizer.spectral."
"""Keys of optimizer state in a checkpoint begin with it where the optimizer can do without them."""


class UnsupportedError(ValueError):
    """Something that is installed or asked for cannot work; the message says the way out."""


@dataclasses.dataclass(frozen=True)
class Versions:
    """What is known of the versions of a package.

    Attributes:
        install: what pip installs.
        tested: versions that the tests were run with.
        oldest: minor version; older ones are refused.
        why: cannot older ones work.
    """

    install: str
    tested: tuple[str, ...]
    oldest: tuple[int, int]
    why: str

    @property
    def way_out(self) -> str:
        """The command that installs a tested version."""
        return f"pip install '{self.install}=={self.tested[-1]}'"


MEGATRON = Versions(
    "megatron-core[training]",
    ("0.18.0", "0.18.2", "0.19.0", "0.19.2"),
    oldest=(0, 18),
    why="have no registry of emerging optimizers, through which the plugin enters",
)
EMERGING = Versions(
    "emerging-optimizers",
    ("0.3.0",),
    oldest=(0, 2),
    why="lack the class Lion, without which Megatron-Core cannot be imported",
)


def check_versions() -> None:
    """Refuse megatron-core and emerging-optimizers that cannot work, warn of untested minor versions.

    Raises:
        UnsupportedError: one is missing, or too old.
    """
    try:
        emerging = version("emerging-optimizers")
    except PackageNotFoundError:
        emerging = None
    _check("megatron-core", megatron_version(), MEGATRON)
    _check("emerging-optimizers", emerging, EMERGING)


@functools.cache
def megatron_version() -> str | None:
    """Version of the ``megatron.core`` that an import would find; a checkout may hide the wheel.

    It is read from the file: importing Megatron here would be too early for the CPU rehearsal.
    """
    try:
        spec = find_spec("megatron.core")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return None
    return version_in(Path(spec.origin).parent)


def version_in(core: Path) -> str:
    """Version of a folder ``megatron/core``.

    Raises:
        OSError: it has no readable ``package_info.py``.
    """
    text = (core / "package_info.py").read_text()
    return ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, re.MULTILINE))


def is_0_18() -> bool:
    """Whether Megatron-Core is of the oldest minor version that works."""
    return str(megatron_version()).startswith("0.18.")


def _check(package: str, found: str | None, known: Versions) -> None:
    if found is None:
        raise UnsupportedError(f"{package} is not installed; {known.way_out}")
    numbers = re.match(r"(\d+)\.(\d+)", found)
    minor = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if minor < known.oldest:
        raise UnsupportedError(
            f"{package} {found} cannot work: versions before {known.oldest[0]}.{known.oldest[1]} "
            f"{known.why}; {known.way_out}"
        )
    if f"{minor[0]}.{minor[1]}" not in {tested.rpartition(".")[0] for tested in known.tested}:
        _warn_once(
            f"{package} {found} was not tested, {', '.join(known.tested)} were; going on, and stopping "
            f"where something that the plugin needs is missing. To be sure: {known.way_out}"
        )


@functools.cache
def _warn_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"sso_megatron: warning: {text}", file=sys.stderr, flush=True)


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
            f"{owner.__name__} has no {name}: megatron-core {megatron_version()} cannot work, "
            f"{', '.join(MEGATRON.tested)} can; {MEGATRON.way_out}"
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
    if is_0_18():
        from megatron.training import checkpointing

        return checkpointing, "open_file"
    from megatron.core.msc_utils import maybe_msc

    return maybe_msc, "open"


def open_with_store(path: Any, *args: Any, **kwargs: Any) -> Any:
    """Open a file as Megatron does, in an object store where that is asked for."""
    from megatron.core import msc_utils

    if is_0_18():
        return msc_utils.open_file(path, *args, **kwargs)
    # Asked of its class: on the object itself the function is replaced.
    return type(msc_utils.maybe_msc).__getattr__(msc_utils.maybe_msc, "open")(path, *args, **kwargs)


def grads_for_norm() -> str:
    """Name of the method by which an optimizer tells the gradients that its norm is made of."""
    return "get_main_grads_for_grad_norm" if is_0_18() else "get_grads_for_grad_norm"


def adamw_state_keys(optimizer: Any) -> list[str]:
    """Names of the state tensors of a ``DistributedOptimizer``; 0.18 knows AdamW's alone."""
    return ["exp_avg", "exp_avg_sq"] if is_0_18() else list(optimizer.optimizer_state_keys)


def expert_model_parallel_group(process_groups: dict[str, Any]) -> Any:
    """The experts' counterpart of ``mp_group`` among an optimizer's process groups."""
    return process_groups["expt_tp_pp_group" if is_0_18() else "expt_tp_pp_with_egtp_remat_group"]
