"""Spectral optimizers for Megatron-Core: the Spectral Sphere Optimizer (SSO), MuonSphere and others.

They are ordinary torch optimizers and need no Megatron; ``sso_megatron.mcore.register`` enters them into
Megatron's optimizer factory.
"""

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
from sso_megatron.version import __version__

__all__ = [
    "SSO",
    "MuonSphere",
    "SSOConfig",
    "Spectra",
    "SpectraConfig",
    "SpectralAdam",
    "SpectralAdamConfig",
    "SpectralClip",
    "SpectralClipConfig",
    "SpectralConfig",
    "__version__",
]
