"""SSO and MuonSphere in Megatron's optimizer factory."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sso_megatron.mcore import compat
from sso_megatron.mcore.initialization import initialize_by_name
from sso_megatron.mcore.layouts import LayoutTable, ModelParameter, layout_of, model_parameters
from sso_megatron.optimizers.config import SpectralConfig, SSOConfig
from sso_megatron.optimizers.sso import SSO, MuonSphere

OPTIMIZERS: dict[str, type[SSO]] = {"sso": SSO, "muon_sphere": MuonSphere}
"""Names of ``--optimizer`` and their classes."""

# The tag by which prepare_model, which sees global names, tells the routing rule what to take.
_SPECTRAL = "_is_spectral"


def register(sso: SSOConfig | None = None, shared: SpectralConfig | None = None) -> None:
    """Enter ``sso`` and ``muon_sphere`` into Megatron's optimizer factory.

    Call it once before the optimizer is built; a later call replaces the settings.

    Args:
        sso: settings of both.
        shared: settings that all spectral optimizers share.

    Raises:
        UnsupportedError: megatron-core or emerging-optimizers is missing or of an untested version.
    """
    compat.check_versions()
    import megatron.core.optimizer as factory

    sso, shared = sso or SSOConfig(), shared or SpectralConfig()
    for name, optimizer_cls in OPTIMIZERS.items():
        compat.registry()[name] = compat.registry_entry(
            optimizer_cls,
            init_state_fn=lambda optimizer, config=None: optimizer.init_state(),
            config_to_kwargs=_config_to_kwargs(sso, shared),
            overrides=_overrides(),
        )
    _current.sso, _current.shared = sso, shared
    compat.wrap(factory, "_get_megatron_emerging_optimizer", _prepare_first)


@dataclass
class _Current:
    """The settings of the last ``register``, and what ``prepare_model`` leaves for the factory."""

    sso: SSOConfig | None = None
    shared: SpectralConfig | None = None
    find_layout: LayoutTable | None = None


_current = _Current()


def _overrides() -> dict[Any, dict[str, Any]]:
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    def is_spectral(param: torch.nn.Parameter) -> bool:
        return getattr(param, _SPECTRAL, False)

    def is_not_spectral(param: torch.nn.Parameter) -> bool:
        return not is_spectral(param)

    spectral = ParamKey(predicate=ParamPredicate(name="spectral", fn=is_spectral))
    other = ParamKey(predicate=ParamPredicate(name="not_spectral", fn=is_not_spectral))
    # The matrices' own weight decay is a setting of SSO; Megatron's would only show in its logs.
    return {spectral: {"wd_mult": 0.0}, other: {"optimizer": "adam"}}


def _config_to_kwargs(sso: SSOConfig, shared: SpectralConfig) -> Callable[..., dict[str, Any]]:
    def build(config: Any, model_chunks: Any, pg_collection: Any) -> dict[str, Any]:
        return {
            "lr": config.lr,
            "config": sso,
            "shared": shared,
            "find_layout": _current.find_layout,
        }

    return build


def _prepare_first(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_megatron_emerging_optimizer(
        config: Any,
        model_chunks: list[Any],
        config_overrides: Any = None,
        pg_collection: Any = None,
    ) -> Any:
        sso, shared = _current.sso, _current.shared
        if config.optimizer in OPTIMIZERS and sso is not None and shared is not None:
            from megatron.core.process_groups_config import ProcessGroupCollection

            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
            _current.find_layout = prepare_model(model_chunks, sso, shared, groups)
        return original(config, model_chunks, config_overrides, pg_collection)

    return get_megatron_emerging_optimizer


def spectral_parts(optimizer: Any) -> list[SSO]:
    """The spectral optimizers inside what Megatron built, in the same order on every rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = (getattr(part, "optimizer", None) for part in parts)
    return [part for part in inner if isinstance(part, SSO)]


def prepare_model(
    model_chunks: Sequence[Any], sso: SSOConfig, shared: SpectralConfig, pg_collection: Any
) -> LayoutTable:
    """Route every parameter, find the logical matrices, and draw the weights if asked to.

    Collectives: one gather of objects over the world, for the exclusion patterns.

    Args:
        model_chunks: this rank's part of the model.
        sso: radius of the initialisation.
        shared: granularity, exclusions and initialisation.
        pg_collection: Megatron's process groups.

    Raises:
        ValueError: a pattern that matches nothing, or a matrix that no rule covers.
    """
    parameters = list(model_parameters(model_chunks, pg_collection))
    packed = [p.name for p in parameters if p.param.ndim > 2 and "experts" in p.name]
    if packed:
        raise ValueError(f"{packed[0]}: experts packed into one tensor are not supported yet")
    matrices = [p for p in parameters if p.is_matrix]
    excluded = _excluded_names(matrices, shared.exclude)
    spectral = [p for p in matrices if p.name not in excluded]
    table = [(p.param, layout_of(p, shared)) for p in spectral]
    for p in parameters:
        setattr(p.param, _SPECTRAL, False)
    for p in spectral:
        setattr(p.param, _SPECTRAL, True)
    if shared.mup_init:
        initialize_by_name(parameters, spectral, sso, shared)
    return LayoutTable(table)


def _excluded_names(matrices: list[ModelParameter], patterns: tuple[str, ...]) -> set[str]:
    """Names that a pattern is found in; a pattern that no rank has a match for is an error."""
    hits = {pattern: {p.name for p in matrices if re.search(pattern, p.name)} for pattern in patterns}
    if not patterns:
        return set()
    # A pattern may match on another pipeline stage or expert-parallel rank alone.
    matched = {pattern for pattern, names in hits.items() if names}
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, matched)
    unused = [p for p in patterns if not any(p in ranks for ranks in everywhere)]
    if unused:
        names = "\n  ".join(p.name for p in matrices)
        raise ValueError(
            f"--spectral-exclude {' '.join(map(repr, unused))} matches no matrix of the model; "
            f"names on this rank:\n  {names}"
        )
    return set().union(*hits.values())
