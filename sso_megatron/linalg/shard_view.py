"""Multiplies matrices by thin blocks where each rank holds a shard of the matrices.

Matrices may be sharded along rows, along columns, or not at all. Blocks ``(b, n, k)`` on the side of the
columns are whole on every rank, and blocks ``(b, m, k)`` on the side of the rows are sharded as the rows
are: so the state of an algorithm on the columns' side is the same in every layout. The matrices
themselves are never communicated.
"""

from dataclasses import dataclass

from torch import Tensor

from sso_megatron.linalg.polar import AllReduce, times_thin


@dataclass(frozen=True)
class ShardView:
    """Describes this rank's shard ``(b, p, q)`` of a batch of ``(m, n)`` matrices.

    Attributes:
        shape: global ``(m, n)``.
        all_reduce: sum over the ranks that hold the other shards; None where matrices are whole.
        first_column: index of the shard's first column where columns are sharded; None where rows are
            sharded, or nothing. Rows may be padded with zeros, columns not.
    """

    shape: tuple[int, int]
    all_reduce: AllReduce | None = None
    first_column: int | None = None

    @property
    def rows_all_reduce(self) -> AllReduce | None:
        """Sum over the ranks that hold the other rows; None where this rank holds all rows."""
        return self.all_reduce if self.first_column is None else None

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the shards. Collective: one sum where matrices are sharded."""
        return x if self.all_reduce is None else self.all_reduce(x)

    def own_columns(self, M: Tensor, X: Tensor) -> Tensor:
        """Return a view of the rows ``(b, q, k)`` of a block ``(b, n, k)`` that belong to M's columns."""
        return X if self.first_column is None else X.narrow(-2, self.first_column, M.size(-1))

    def times(self, M: Tensor, V: Tensor) -> Tensor:
        """Return this rank's rows ``(b, p, k)`` of ``M V``. Collective: one sum where columns are sharded.

        Args:
            M: ``(b, p, q)``.
            V: ``(b, n, k)``, the same on every rank.
        """
        image = times_thin(M, self.own_columns(M, V))
        return image if self.first_column is None else self.sum(image)

    def transpose_times(self, M: Tensor, U: Tensor) -> Tensor:
        """Return ``M^T U``, ``(b, n, k)``, whole on every rank. Collective: one sum where M is sharded.

        Args:
            M: ``(b, p, q)``.
            U: ``(b, p, k)``, the rows that this rank holds.
        """
        image = times_thin(M.mT, U)
        if self.first_column is not None:
            whole = image.new_zeros(image.size(0), self.shape[1], image.size(-1))
            self.own_columns(M, whole).copy_(image)
            image = whole
        return self.sum(image)
