"""Spectral optimizers for Megatron-Core: the Spectral Sphere Optimizer (SSO) and MuonSphere.

``SSO`` and ``MuonSphere`` are ordinary torch optimizers and need no Megatron;
``sso_megatron.mcore.register`` enters them into Megatron's optimizer factory.
"""

from sso_megatron.optimizers.config import SpectralConfig, SSOConfig
from sso_megatron.optimizers.sso import SSO, MuonSphere
from sso_megatron.version import __version__

__all__ = ["SSO", "MuonSphere", "SSOConfig", "SpectralConfig", "__version__"]
