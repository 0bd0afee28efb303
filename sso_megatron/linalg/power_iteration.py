"""Top singular triplet by Chebyshev-filtered block power iteration with a warm start.

Weights trained by SSO have many singular values close to the largest one (the tangent constraint
holds back one direction while the others rise to the sphere), and there a single vector
under-estimates the norm by many per cent. A block with Rayleigh-Ritz does not; a Chebyshev filter
between the block's smallest Ritz value and its largest makes each product count for several plain ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sso_megatron.linalg.polar import Total


class TopSingular(NamedTuple):
    """The result of ``power_iteration`` for a batch of ``b`` matrices ``(m, n)``.

    Attributes:
        sigma: ``(b,)`` largest Ritz value: a lower bound of the spectral norm.
        u: ``(b, m)`` left singular vectors, unit length (zero for a zero matrix); where the rows are
            cut, this rank's part of them.
        v: ``(b, n)`` right singular vectors, unit length.
        basis: ``(b, s, k)`` orthonormal block to start the next call from.
    """

    sigma: Tensor
    u: Tensor
    v: Tensor
    basis: Tensor


def start_basis(W: Tensor, block_size: int, *, rows_are_cut: bool = False) -> Tensor:
    """An orthonormal ``(b, s, k)`` block to start from, the same on every rank and device.

    Args:
        W: ``(b, m, n)``; gives shape, dtype and device.
        block_size: ``k``; no more than ``s`` columns are made.
        rows_are_cut: ``s`` is ``n``, the side that is whole here; else it is ``min(m, n)``.
    """
    side = W.size(-1) if rows_are_cut else min(W.shape[-2:])
    # A generator of its own: the training's random state must not depend on the optimizer.
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(side, min(block_size, side), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(block).Q.to(device=W.device, dtype=W.dtype)
    return basis.expand(W.size(0), -1, -1).contiguous()


def power_iteration(
    W: Tensor, basis: Tensor, *, degree: int, num_passes: int = 1, total: Total | None = None
) -> TopSingular:
    """``(sigma, u, v)`` of every matrix of a batch, and the block for the next call.

    On whole matrices one pass costs ``2 degree + 1`` products of ``W`` with ``k`` vectors, one QR and
    one symmetric eigenproblem of size ``k``. Where rows are cut the products go through the Gram
    matrix ``W^T W``, which is summed once: one ``total`` however many passes.

    Args:
        W: ``(b, m, n)``, float32 or float64.
        basis: ``(b, s, k)`` with orthonormal columns: ``start_basis`` or the last call's.
        degree: degree of the Chebyshev polynomial in the Gram matrix, at least 1.
        num_passes: filter, orthonormalise and rotate this many times; more for a cold start.
        total: sum over the ranks that hold the other rows; None for whole matrices.
    """
    is_tall = total is not None or W.size(-2) >= W.size(-1)
    tall = W if is_tall else W.mT
    gram = None if total is None else total(tall.mT @ tall)

    def apply(V: Tensor) -> Tensor:
        return tall.mT @ (tall @ V) if gram is None else gram @ V

    for _ in range(num_passes):
        if basis.size(-1) < basis.size(-2):  # a full basis is exact without a filter
            basis = torch.linalg.qr(_chebyshev_filter(apply, basis, degree)).Q
        image = tall @ basis if gram is None else gram @ basis
        ritz = image.mT @ image if gram is None else basis.mT @ image
        # Ascending order; sigma^2 is accurate to rounding for the large Ritz values, which matter.
        # A matrix with NaN gives NaN results: eigh would raise, and not on every rank of a group.
        _, rotation = torch.linalg.eigh(ritz.nan_to_num(posinf=0.0, neginf=0.0))
        basis, image = basis @ rotation, image @ rotation
    short_vector = basis[..., -1]
    if gram is None:
        long_vector = image[..., -1]
        sigma = torch.linalg.vector_norm(long_vector, dim=-1)
    else:
        long_vector = (tall @ short_vector.unsqueeze(-1)).squeeze(-1)
        sigma = (short_vector * image[..., -1]).sum(dim=-1).clamp_min(0).sqrt()
    long_vector = long_vector / sigma.clamp_min(torch.finfo(W.dtype).tiny).unsqueeze(-1)
    if is_tall:
        return TopSingular(sigma, long_vector, short_vector, basis)
    return TopSingular(sigma, short_vector, long_vector, basis)


def _chebyshev_filter(apply: Callable[[Tensor], Tensor], V: Tensor, degree: int) -> Tensor:
    """``p(A) V`` with ``|p| <= p(theta_k)`` below the smallest Ritz value and steep above it.

    The three-term recurrence is scaled to 1 at the largest Ritz value (Zhou and Saad's scaled form),
    so nothing overflows however far apart the singular values are.

    Args:
        apply: product with the positive semi-definite ``A``, ``(b, s, s)``.
        V: ``(b, s, k)``, orthonormal columns.
        degree: at least 1.
    """
    Y = apply(V)
    ritz = (V * Y).sum(dim=-2, keepdim=True)  # (b, 1, k)
    top = ritz.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(V.dtype).tiny)
    # The damped interval [0, cut]; a floor keeps the recurrence finite for rank-deficient matrices.
    half = torch.maximum(ritz.amin(dim=-1, keepdim=True), 1e-6 * top) / 2
    first = half / (top - half)
    scale = first
    previous, current = V, (Y - half * V) * (first / half)
    for _ in range(degree - 1):
        next_scale = 1 / (2 / first - scale)
        step = (2 * next_scale / half) * (apply(current) - half * current)
        previous, current = current, step - (scale * next_scale) * previous
        scale = next_scale
    return current
