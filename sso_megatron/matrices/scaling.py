"""Radius of the spectral sphere and scale of the update, from a matrix's global logical shape."""

import math

from torch import Tensor


def target_radius(shape: tuple[int, int], mode: str, scaler: float) -> float:
    """Return the radius R of the sphere that a weight is held on (arXiv 2601.08393, section 3).

    Args:
        shape: global ``(d_out, d_in)``.
        mode: ``spectral_mup``: ``c sqrt(d_out / d_in)``; ``identity``: ``c``.
        scaler: ``c``.

    Raises:
        ValueError: another mode; ``from_weights`` has no radius before there are weights.
    """
    if mode not in ("spectral_mup", "identity"):
        raise ValueError(f"radius_mode={mode!r} gives no radius to a shape; use spectral_mup or identity")
    d_out, d_in = shape
    return scaler * math.sqrt(d_out / d_in) if mode == "spectral_mup" else scaler


def update_scale[R: (float, Tensor)](shape: tuple[int, int], mode: str, radius: R) -> R | float:
    """Return the factor between ``lr * Phi`` and the step (arXiv 2601.08393, eq. 16).

    Args:
        shape: global ``(d_out, d_in)``.
        mode: ``spectral_mup``: R itself; ``align_adam_rms``: ``0.2 sqrt(max(d_out, d_in))``;
            ``spectral_kaiming``: ``sqrt(max(1, d_out / d_in))``.
        radius: R, of one matrix or ``(b,)``.
    """
    d_out, d_in = shape
    if mode == "spectral_mup":
        return radius
    if mode == "align_adam_rms":
        return 0.2 * math.sqrt(max(d_out, d_in))
    return math.sqrt(max(1.0, d_out / d_in))
