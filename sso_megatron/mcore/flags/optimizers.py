"""The names that this package adds to ``--optimizer``, each with its optimizer and settings."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.config import (
    SpectraConfig,
    SpectralAdamConfig,
    SpectralClipConfig,
    SpectralConfig,
    SSOConfig,
)
from sso_megatron.optimizers.spectra import Spectra
from sso_megatron.optimizers.spectral_adam import SpectralAdam
from sso_megatron.optimizers.spectral_clip import SpectralClip
from sso_megatron.optimizers.sso import SSO, MuonSphere


@dataclass(frozen=True)
class OptimizerSpec:
    """The optimizer that a name of ``--optimizer`` selects, and its settings.

    Attributes:
        optimizer_cls: class of the torch optimizer.
        config_cls: the dataclass of its settings; its fields become flags.
        prefix: prefix of these flags, with underscores.
        fixed: settings that the name decides, which have no flag.
    """

    optimizer_cls: type[SpectralOptimizer]
    config_cls: type
    prefix: str
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def has_spheres(self) -> bool:
        """Whether the optimizer keeps weights on spheres."""
        return issubclass(self.optimizer_cls, SSO)


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sso": OptimizerSpec(SSO, SSOConfig, "sso"),
    "muon_sphere": OptimizerSpec(MuonSphere, SSOConfig, "sso"),
    "spectra": OptimizerSpec(Spectra, SpectraConfig, "spectra"),
    **{
        f"spectra_clip_{base}": OptimizerSpec(
            SpectralClip, SpectralClipConfig, "spectra_clip", {"base": base}
        )
        for base in ("adamw", "signum", "ademamix")
    },
    "spectral_adam": OptimizerSpec(SpectralAdam, SpectralAdamConfig, "spectral_adam"),
}
"""Our optimizers by the name that ``--optimizer`` takes; a line here adds an optimizer to Megatron."""


def config_classes() -> dict[str, type]:
    """Return the dataclasses that flags are made from, by the flags' prefix."""
    return {"spectral": SpectralConfig} | {spec.prefix: spec.config_cls for spec in OPTIMIZERS.values()}


def names_with(prefix: str) -> str:
    """Return the names of the optimizers that read the settings of a prefix, as text for messages."""
    is_shared = prefix == "spectral"
    return " or ".join(name for name, spec in OPTIMIZERS.items() if is_shared or spec.prefix == prefix)


def flag_fields(prefix: str) -> list["dataclasses.Field[Any]"]:
    """Return the settings of a prefix that have a flag: those that no optimizer's name decides."""
    fixed = {name for spec in OPTIMIZERS.values() if spec.prefix == prefix for name in spec.fixed}
    return [f for f in dataclasses.fields(config_classes()[prefix]) if f.name not in fixed]


def flags_of(prefix: str, names: list[str]) -> str:
    """Return the flags of some settings of a prefix, as text for messages."""
    return " and ".join(f"--{prefix}-{name}".replace("_", "-") for name in names)
