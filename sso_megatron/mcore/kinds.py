"""The names that ``--optimizer`` takes from us, and what stands behind each."""

import argparse
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
class Kind:
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


OPTIMIZERS: dict[str, Kind] = {
    "sso": Kind(SSO, "sso"),
    "muon_sphere": Kind(MuonSphere, "sso"),
    "spectra": Kind(Spectra, "spectra"),
    **{
        f"spectra_clip_{base}": Kind(SpectralClip, "spectra_clip", {"base": base})
        for base in ("adamw", "signum", "ademamix")
    },
    "spectral_adam": Kind(SpectralAdam, "spectral_adam"),
}
"""By the name that ``--optimizer`` takes."""


def names_with(prefix: str) -> str:
    """Names of the optimizers that read the settings of a prefix, to be shown."""
    is_shared = prefix == "spectral"
    return " or ".join(name for name, kind in OPTIMIZERS.items() if is_shared or kind.prefix == prefix)


def flag_fields(prefix: str) -> list["dataclasses.Field[Any]"]:
    """Settings that have a flag: all but those that the optimizer's name says."""
    fixed = {name for kind in OPTIMIZERS.values() if kind.prefix == prefix for name in kind.fixed}
    return [f for f in dataclasses.fields(CONFIGS[prefix]) if f.name not in fixed]


def flags_of(prefix: str, names: list[str]) -> str:
    """Flags of settings, to be shown."""
    return " ".join(f"--{prefix}-{name}".replace("_", "-") for name in names)


def from_schedule(kind: Kind, args: argparse.Namespace) -> dict[str, int]:
    """Settings that stand at 0 and that the run's own length and warmup give.

    Args:
        kind: of the optimizer.
        args: Megatron's, parsed and not validated yet.

    Raises:
        ValueError: the run is told in samples, and not all batches have the same number of them.
    """
    names = ("train_steps", "c_warmup_steps")
    missing = [name for name in names if kind.prefix == "spectra_clip" and not _of_clip(args, name)]
    if not missing:
        return {}
    varies = [flag for flag in ("rampup_batch_size", "step_batch_size_schedule") if getattr(args, flag)]
    if varies and args.train_samples:
        flag, wanted = varies[0].replace("_", "-"), flags_of(kind.prefix, missing)
        raise ValueError(
            f"--train-samples with --{flag}: does not tell the number of steps, which --optimizer "
            f"{args.optimizer} goes by; give {wanted} (1 for no warmup of c)"
        )
    batch = _batch_size(args)

    def steps(count: int | None, samples: int | None) -> int:
        return count or (samples // batch if samples and batch else 0)

    length = steps(args.train_iters, args.train_samples)
    if args.lr_warmup_fraction is not None:
        decay = steps(args.lr_decay_iters, args.lr_decay_samples) or length
        warmup = int(args.lr_warmup_fraction * decay)
    else:
        warmup = steps(args.lr_warmup_iters, args.lr_warmup_samples)
    known = {"train_steps": length, "c_warmup_steps": min(warmup, length)}
    return {name: known[name] for name in missing}


def _of_clip(args: argparse.Namespace, name: str) -> int:
    return int(getattr(args, f"spectra_clip_{name}"))


def _batch_size(args: argparse.Namespace) -> int:
    """Samples of a step, as Megatron will find them; 0 where it will refuse the arguments."""
    if args.global_batch_size:
        return int(args.global_batch_size)
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return int((args.micro_batch_size or 0) * (args.world_size // ranks))
