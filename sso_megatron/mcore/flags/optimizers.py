"""The names that ``--optimizer`` takes from us, and what stands behind each."""

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

CONFIGS: dict[str, type] = {
    "spectral": SpectralConfig,
    "sso": SSOConfig,
    "spectra": SpectraConfig,
    "spectra_clip": SpectralClipConfig,
    "spectral_adam": SpectralAdamConfig,
}
"""Prefix of the flags, and the dataclass they are made from."""


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer by name.

    Attributes:
        optimizer_cls: its class.
        prefix: of its settings in ``CONFIGS``.
        fixed: settings that the name says.
    """

    optimizer_cls: type[SpectralOptimizer]
    prefix: str
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def config_cls(self) -> type:
        """The dataclass of its settings."""
        return CONFIGS[self.prefix]

    @property
    def has_spheres(self) -> bool:
        """Whether it keeps weights on spheres."""
        return issubclass(self.optimizer_cls, SSO)


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sso": OptimizerSpec(SSO, "sso"),
    "muon_sphere": OptimizerSpec(MuonSphere, "sso"),
    "spectra": OptimizerSpec(Spectra, "spectra"),
    **{
        f"spectra_clip_{base}": OptimizerSpec(SpectralClip, "spectra_clip", {"base": base})
        for base in ("adamw", "signum", "ademamix")
    },
    "spectral_adam": OptimizerSpec(SpectralAdam, "spectral_adam"),
}
"""By the name that ``--optimizer`` takes."""


def names_with(prefix: str) -> str:
    """Names of the optimizers that read the settings of a prefix, to be shown."""
    is_shared = prefix == "spectral"
    return " or ".join(name for name, spec in OPTIMIZERS.items() if is_shared or spec.prefix == prefix)


def flag_fields(prefix: str) -> list["dataclasses.Field[Any]"]:
    """Settings that have a flag: all but those that the optimizer's name says."""
    fixed = {name for spec in OPTIMIZERS.values() if spec.prefix == prefix for name in spec.fixed}
    return [f for f in dataclasses.fields(CONFIGS[prefix]) if f.name not in fixed]


def flags_of(prefix: str, names: list[str]) -> str:
    """Flags of settings, to be shown."""
    return " ".join(f"--{prefix}-{name}".replace("_", "-") for name in names)
