"""Measures how far a trained model's weights are off their spectral spheres."""

from collections.abc import Iterable

from sso_megatron.linalg.norms.spectral_norm import spectral_norm
from sso_megatron.optimizers.sso import SSO


def max_radius_error(optimizers: Iterable[SSO]) -> float | None:
    """Largest ``| ||W||_2 - R | / R`` right after a retraction, over this rank's logical matrices.

    Spectral norms come from an exact SVD in float64 up to a short side of 1024, beyond that from a long
    power iteration. Weights stay as they are. Every rank of a tensor-parallel group must call it.

    Collectives: those of ``SSO.retracted``.

    Returns:
        None where this rank has no matrix.
    """
    errors = [
        abs(spectral_norm(matrix) - radius) / radius
        for optimizer in optimizers
        for _, matrix, radius in optimizer.retracted()
    ]
    return max(errors, default=None)
