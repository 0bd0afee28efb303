"""Computes the stable rank ``||A||_F^2 / ||A||_2^2`` of tall matrices in chunks of rows (streaming).

The rows are not kept. The state of a matrix is the square of their Frobenius norm and a block that spans
the largest right singular directions. The next rows are appended to that block, as if it were rows
itself, and iterated, as in an incremental singular value decomposition; so are the blocks of several
ranks in the end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sso_megatron.linalg.block_iteration import gram_eigh, iterate_block, unit_columns
from sso_megatron.linalg.orthonormal import random_basis
from sso_megatron.linalg.polar import AllReduce, frobenius_norm
from sso_megatron.linalg.precision import float32_products
from sso_megatron.linalg.shard_view import ShardView

# Measured with 256 columns and rows that came in sixteen chunks: stable ranks are within 1e-4 where the
# singular values fall as 1/j or 1/sqrt(j) or stand out, and 2e-3 too large where they fall as exp(-j/50);
# 10 % for Gaussian noise, and 6 % where each of forty chunks has a large direction of its own. In a single
# chunk 1e-4, and 1 % for noise.
COLUMNS = 32
"""Columns of a block; a matrix of fewer columns has a block of as many."""
_PASSES = 8


@dataclass
class StreamedRows:
    """The state of a matrix with ``n`` columns after the rows seen so far.

    Attributes:
        square: ``||A||_F^2``, 0-d float64, of the columns that this rank holds.
        block: ``(n, k)``, whole on every rank: ``block block^T`` is ``A^T A`` in the largest directions;
            None before the first rows.
    """

    square: Tensor
    block: Tensor | None = None


@float32_products("ieee")
def add_rows(rows: StreamedRows, A: Tensor, view: ShardView) -> None:
    """Add ``(t, q)`` rows to the state, with the columns that this rank holds.

    Eight passes take ``4 t q k`` flops each. Collectives where columns are sharded: two sums a pass.

    Args:
        rows: state to update in place.
        A: the rows, floating point; a float32 copy is made and dropped.
        view: which columns these are; its number of rows is ignored.
    """
    if not A.numel():
        return
    A = A.to(torch.promote_types(A.dtype, torch.float32)).unsqueeze(0)
    rows.square += frobenius_norm(A).square()[0]
    V = random_basis(view.shape[1], COLUMNS, A)
    if rows.block is not None:
        block = rows.block.unsqueeze(0)
        lengths = torch.linalg.vector_norm(block, dim=-2, dtype=torch.float64)
        V = unit_columns(block, lengths, otherwise=V)
        A = torch.cat([view.own_columns(A, block).mT, A], dim=-2)
    rows.block = iterate_block(A, V, view, num_passes=_PASSES).Y[0]


@float32_products("ieee")
def squared_norms(blocks: Tensor, all_reduce: AllReduce | None = None) -> Tensor:
    """Return ``||A||_2^2`` of matrices from the blocks of their rows.

    Args:
        blocks: ``(b, n, k)``.
        all_reduce: sum over the ranks that saw other rows of the same matrices; None where this
            rank saw all rows. It is called three times in each of eight passes.

    Returns:
        ``(b,)`` float64; NaN where a block has an entry that is not finite.
    """
    if all_reduce is not None:
        view = ShardView((blocks.size(-1), blocks.size(-2)), all_reduce)
        V = random_basis(blocks.size(-2), blocks.size(-1), blocks)
        blocks = iterate_block(blocks.mT, V, view, num_passes=_PASSES).Y
    return gram_eigh(blocks.double())[0][:, -1]
