"""Products of matrices with thin blocks where each rank holds a part of the matrices.

Rows may be cut over ranks, or columns, or nothing. Blocks ``(b, n, k)`` on the side of the columns are
whole on every rank, and ``(b, m, k)`` on the side of the rows lie as the rows do: so what an algorithm
keeps on the columns' side is the same in every layout. The matrices themselves never travel.
"""

from dataclasses import dataclass

from torch import Tensor

from sso_megatron.linalg.polar import AllReduce, times_thin


@dataclass(frozen=True)
class ShardView:
    """The part ``(b, p, q)`` of a batch of ``(m, n)`` matrices that is held here.

    Attributes:
        shape: global ``(m, n)``.
        all_reduce: sum over the ranks that hold the other parts; None where matrices are whole.
        first_column: place of the first column that is held here where columns are cut; None where rows
            are cut, or nothing. Rows may be padded with zeros, columns not.
    """

    shape: tuple[int, int]
    all_reduce: AllReduce | None = None
    first_column: int | None = None

    @property
    def rows_all_reduce(self) -> AllReduce | None:
        """Sum over the ranks that hold the other rows; None where all rows are here."""
        return self.all_reduce if self.first_column is None else None

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the parts. One sum where matrices are cut."""
        return x if self.all_reduce is None else self.all_reduce(x)

    def own_columns(self, M: Tensor, X: Tensor) -> Tensor:
        """The rows ``(b, q, k)`` of a whole block ``(b, n, k)`` that belong to the columns of M; a view."""
        return X if self.first_column is None else X.narrow(-2, self.first_column, M.size(-1))

    def times(self, M: Tensor, V: Tensor) -> Tensor:
        """``M V`` for ``(b, n, k)``, the rows that are held here. One sum where columns are cut.

        Args:
            M: ``(b, p, q)``.
            V: ``(b, n, k)``, the same on every rank.
        """
        image = times_thin(M, self.own_columns(M, V))
        return image if self.first_column is None else self.sum(image)

    def transpose_times(self, M: Tensor, U: Tensor) -> Tensor:
        """``M^T U``, ``(b, n, k)``, whole on every rank. One sum where matrices are cut.

        Args:
            M: ``(b, p, q)``.
            U: ``(b, p, k)``, the rows that are held here.
        """
        image = times_thin(M.mT, U)
        if self.first_column is not None:
            whole = image.new_zeros(image.size(0), self.shape[1], image.size(-1))
            self.own_columns(M, whole).copy_(image)
            image = whole
        return self.sum(image)
