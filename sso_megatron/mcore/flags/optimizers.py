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


@dataclass(frozen=True)
class OptimizerSpec:
    """What a name of ``--optimizer`` stands for.

    Attributes:
        optimizer_cls: the torch optimizer.
        config_cls: the dataclass of its settings; its fields become flags.
        prefix: of these flags, with underscores.
        fixed: settings that the name decides, which have no flag.
    """

    optimizer_cls: type[SpectralOptimizer]
    config_cls: type
    prefix: str
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def has_spheres(self) -> bool:
        """Whether it keeps weights on spheres."""
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
"""By the name that ``--optimizer`` takes. A line here is all that Megatron needs to know an optimizer."""


def config_classes() -> dict[str, type]:
    """The dataclasses that flags are made from, by the flags' prefix."""
    return {"spectral": SpectralConfig} | {spec.prefix: spec.config_cls for spec in OPTIMIZERS.values()}


def names_with(prefix: str) -> str:
    """Names of the optimizers that read the settings of a prefix, to be shown."""
    is_shared = prefix == "spectral"
    return " or ".join(name for name, spec in OPTIMIZERS.items() if is_shared or spec.prefix == prefix)


def flag_fields(prefix: str) -> list["dataclasses.Field[Any]"]:
    """Settings that have a flag: all but those that the optimizer's name says."""
    fixed = {name for spec in OPTIMIZERS.values() if spec.prefix == prefix for name in spec.fixed}
    return [f for f in dataclasses.fields(config_classes()[prefix]) if f.name not in fixed]


def flags_of(prefix: str, names: list[str]) -> str:
    """Flags of settings, to be shown."""
    return " ".join(f"--{prefix}-{name}".replace("_", "-") for name in names)
