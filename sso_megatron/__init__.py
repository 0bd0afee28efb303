"""Spectral optimizers for Megatron-Core: the Spectral Sphere Optimizer (SSO), MuonSphere and others.

They are ordinary torch optimizers and need no Megatron; ``sso_megatron.mcore.register`` enters them into
Megatron's optimizer factory. Names are imported when they are first used, so that a command line tool that
only shows its help does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sso_megatron.version import __version__

if TYPE_CHECKING:
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

_MODULES = {"MuonSphere": "sso", "SSO": "sso", "Spectra": "spectra", "SpectralAdam": "spectral_adam"}
_MODULES |= {"SpectralClip": "spectral_clip"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"sso_megatron.optimizers.{_MODULES.get(name, 'config')}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
