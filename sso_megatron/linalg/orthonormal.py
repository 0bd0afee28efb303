"""Makes orthonormal bases: of a thin block whose rows may be sharded, and random ones to start from."""

import torch
from torch import Tensor

from sso_megatron.linalg.polar import AllReduce

# Added to the Gram matrix of unit columns, so that rounding cannot end its Cholesky factorisation early:
# the largest error of a sum of 1e4 products in float64. The component of a column that is orthogonal to the
# columns before it comes out of a pass at full length if it was longer than 1e-6; for a shorter one the
# second pass does the rest.
_SHIFT = 1e-12
_PASSES = 2


def random_basis(n: int, k: int, like: Tensor) -> Tensor:
    """Return an orthonormal block ``(b, n, min(k, n))``, the same for every matrix, rank and device.

    Args:
        n: rows.
        k: columns.
        like: ``(b, p, q)``; gives the number of matrices, dtype and device.
    """
    # A generator of its own: the training's random state must not depend on the optimizer.
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(n, min(k, n), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(block).Q.to(device=like.device, dtype=like.dtype)
    return basis.expand(like.size(0), -1, -1).contiguous()


def orthonormalize(P: Tensor, all_reduce: AllReduce | None = None) -> Tensor:
    """Return ``U``, the orthonormal columns of a QR factorisation of ``P``, by two passes of Cholesky-QR.

    Columns may have any scale. Where the component of a column that is orthogonal to the columns before it
    is only rounding, the column comes out arbitrary or zero, with a length of at most 1; a zero column
    comes out zero. Signs are those of a triangular factor with a positive diagonal. The passes are in
    float64, and do not wait for the device.

    Args:
        P: ``(b, p, k)`` float32 or float64, all rows or this rank's.
        all_reduce: sum over the ranks that hold the other rows, called twice, with ``(b, k, k)`` float64
            numbers; None for whole blocks.

    Returns:
        ``(b, p, k)`` in P's dtype.
    """
    U = P.double()
    unit = torch.eye(P.size(-1), dtype=U.dtype, device=U.device)
    for number in range(_PASSES):
        gram = U.mT @ U
        if all_reduce is not None:
            gram = all_reduce(gram)
        lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        # Once only: a column that is short after a pass is rounding, and must not grow.
        scales = torch.where(lengths > 0, 1 / lengths, 0.0) if number == 0 else torch.ones_like(lengths)
        gram = scales.unsqueeze(-1) * gram * scales.unsqueeze(-2)
        factor = torch.linalg.cholesky_ex(gram + _SHIFT * unit).L
        inverse = torch.linalg.solve_triangular(factor, unit, upper=False)
        U = U @ (scales.unsqueeze(-1) * inverse.mT)
    return U.to(P.dtype)
