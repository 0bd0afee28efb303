"""Finds the largest singular directions of slowly changing matrices by cached power iteration with a block.

This is an orthogonal iteration whose block is kept from step to step (arXiv 2602.11185); with one column
it is the ordinary power iteration. Matrices may be sharded (``linalg.shard_view``).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sso_megatron.linalg.orthonormal import orthonormalize, random_basis
from sso_megatron.linalg.precision import float32_products
from sso_megatron.linalg.shard_view import ShardView

# Passes of a start from random vectors: with these the block has more of M than torch.svd_lowrank finds,
# for noise, spikes in noise and singular values that fall as j^-1/2 and j^-1 (512 x 512 and 512 x 1536).
_COLD_PASSES = 4


class Block(NamedTuple):
    """The result of ``iterate_block`` for ``(m, n)`` matrices.

    Attributes:
        U: ``(b, p, k)`` this rank's rows of an orthonormal block on the left.
        Y: ``(b, n, k)``, ``M^T U``, whole on every rank.
        lengths: ``(b, k)`` float64 lengths of Y's columns: the singular values, once these have settled.
    """

    U: Tensor
    Y: Tensor
    lengths: Tensor


def iterate_block(M: Tensor, V: Tensor, view: ShardView, *, num_passes: int = 1) -> Block:
    """Return an orthonormal basis ``U`` of ``M V``, and ``Y = M^T U``, whose unit columns are the next V.

    A pass takes ``4 p q k`` flops. Sums over ranks: three a pass where rows are sharded (two of ``k x k``
    float64 numbers, one of ``n x k``), two where columns are sharded (of ``m x k`` and ``n x k``).

    Args:
        M: ``(b, p, q)`` float32 or float64, this rank's shard.
        V: ``(b, n, k)`` block to start from, the same on every rank; its columns need not be orthogonal.
        view: the place of M in the whole matrices.
        num_passes: at least 1.
    """
    block = _pass(M, V, view)
    for _ in range(num_passes - 1):
        V = unit_columns(block.Y, block.lengths, otherwise=V)
        block = _pass(M, V, view)
    return block


def _pass(M: Tensor, V: Tensor, view: ShardView) -> Block:
    U = orthonormalize(view.times(M, V), view.rows_all_reduce)
    Y = view.transpose_times(M, U)
    return Block(U, Y, torch.linalg.vector_norm(Y, dim=-2, dtype=torch.float64))


@float32_products("ieee")
def find_block(M: Tensor, k: int, view: ShardView) -> Tensor:
    """Return ``(b, n, k)`` right singular vectors to start from, largest first, the same on every rank.

    They come from a fixed random block, by four passes and a rotation within the space that these find;
    the host waits for the device. Where M has fewer than k directions the others are random.
    """
    n = view.shape[1]
    V = random_basis(n, k, M)
    _, Y, lengths = iterate_block(M, V, view, num_passes=_COLD_PASSES)
    # Scaled, so that the squares of small momenta do not underflow before eigh.
    size = torch.linalg.vector_norm(lengths, dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    Y = Y.double() / size[:, None, None]
    Y = Y @ gram_eigh(Y)[1].flip(-1)
    lengths = torch.linalg.vector_norm(Y, dim=-2)
    floor = torch.finfo(M.dtype).eps * lengths[:, :1]
    return unit_columns(Y.to(M.dtype), lengths, otherwise=V, floor=floor)


def gram_eigh(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ascending eigenvalues and the eigenvectors of ``Y^T Y``.

    Where Y is not finite these are NaN and the identity.

    Args:
        Y: ``(b, n, k)`` float64.
    """
    gram = Y.mT @ Y
    is_finite = gram.isfinite().all(dim=-1).all(dim=-1)
    # For one matrix that is not finite eigh would raise an error, and return nothing for the others.
    values, vectors = torch.linalg.eigh(torch.where(is_finite[:, None, None], gram, 0.0))
    return torch.where(is_finite[:, None], values, torch.nan), vectors


def unit_columns(Y: Tensor, lengths: Tensor, *, otherwise: Tensor, floor: Tensor | float = 0.0) -> Tensor:
    """Return ``Y`` with its columns divided by their ``lengths``.

    Columns whose length is not above ``floor`` are taken from ``otherwise``.

    Args:
        Y: ``(b, n, k)``.
        lengths: ``(b, k)`` float64 lengths of Y's columns.
        otherwise: ``(b, n, k)``.
        floor: at least 0, one number for all columns or ``(b, 1)``.
    """
    is_long = (lengths > floor) & (lengths > torch.finfo(Y.dtype).tiny)
    scales = torch.where(is_long, 1 / lengths, 0.0).to(Y.dtype)
    return torch.where(is_long.unsqueeze(-2), Y * scales.unsqueeze(-2), otherwise)
