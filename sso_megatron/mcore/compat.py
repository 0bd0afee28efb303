"""Which Megatron-Core this works with, and every private name of it that we rely on.

A new Megatron version means reading this file, not the rest.
"""

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SUPPORTED_MEGATRON = ((0, 19), (0, 20))
"""At least the first, below the second."""

SUPPORTED_EMERGING = ((0, 3), (0, 4))

SHARDED_WHOLE = "is_managed_by_layer_wise_optimizer"
"""Megatron's tag of parameters that DDP keeps in buffers of their own, one shard for each of them."""

OPTIONAL_STATE = "optimizer.spectral."
"""Keys of optimizer state in a checkpoint begin with it where the optimizer can do without them."""


class UnsupportedError(ValueError):
    """Something that is installed or asked for cannot work; the message says the way out."""


def check_versions() -> None:
    """Raise UnsupportedError unless megatron-core and emerging-optimizers are of a tested version."""
    _check("megatron-core", megatron_version(), SUPPORTED_MEGATRON, "megatron-core[training]")
    try:
        emerging = version("emerging-optimizers")
    except PackageNotFoundError:
        emerging = None
    _check("emerging-optimizers", emerging, SUPPORTED_EMERGING, "emerging-optimizers")


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
    text = (Path(spec.origin).parent / "package_info.py").read_text()
    return ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, re.MULTILINE))


def _check(
    package: str, found: str | None, supported: tuple[tuple[int, int], tuple[int, int]], install: str
) -> None:
    (low_major, low_minor), (high_major, high_minor) = supported
    wanted = f">={low_major}.{low_minor},<{high_major}.{high_minor}"
    way_out = f"pip install '{install}{wanted}'"
    if found is None:
        raise UnsupportedError(f"{package} is not installed; {way_out}")
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if not numbers or not supported[0] <= (int(numbers[1]), int(numbers[2])) < supported[1]:
        raise UnsupportedError(f"{package} {found} is not supported, {wanted} is; {way_out}")


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
        raise UnsupportedError(f"{owner.__name__} has no {name}; this Megatron-Core is not supported")
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
