"""Takes a step of Spectra on a batch of matrices (arXiv 2602.11185): suppress the spike, keep the tail.

The momentum's ``k`` largest singular values, its spike, are set to the root mean square of the others, its
tail, which is left as it is. Cached power iteration finds the spike, so that no Newton-Schulz iteration
is needed. The spectral clipping of arXiv 2603.14315, SPECTRA, is another algorithm.

The same body works on whole matrices and on shards of them, along rows or along columns.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sso_megatron.linalg.block_iteration import iterate_block, unit_columns
from sso_megatron.linalg.polar import frobenius_norm
from sso_megatron.linalg.precision import float32_products
from sso_megatron.linalg.shard_view import ShardView

# Lengths below this many units of rounding of ||M||_F are taken for rounding. Directions that a float32
# momentum of rank 1 or 3 does not have came out at 1 to 25 units, in two of twenty cases at 100 in a first
# pass.
_ROUNDING = 32


@dataclass(frozen=True)
class SpectraRule:
    """The settings of a step that do not change from matrix to matrix.

    Attributes:
        num_iterations: passes of the power iteration a step (the paper's T).
        update_rms: root mean square of the update's entries, divided by ``lr``.
        eps: added to the root mean square of the direction's entries before dividing by it.
    """

    num_iterations: int
    update_rms: float
    eps: float


@dataclass
class SpectraCache:
    """State of a batch from step to step.

    Attributes:
        V: ``(b, n, k)`` right singular vectors of the spike, whole on every rank; ``find_block`` starts it.
    """

    V: Tensor


@dataclass(frozen=True)
class SpectraStats:
    """Numbers that a step found, on the device; nothing is synchronised.

    Attributes:
        spike: ``(b, k)`` lengths of ``M^T U``: the spike's singular values, as far as they have settled.
        tail_rms: ``(b,)`` root mean square of the other singular values.
    """

    spike: Tensor
    tail_rms: Tensor


def spike_rank(shape: tuple[int, int], ratio: float) -> int:
    """Return ``k = max(1, round(ratio * min(m, n)))`` for a global shape, but less than ``min(m, n)``.

    A vector has no tail beside a spike, and therefore no spike: for it ``k`` is 0.
    """
    short = min(shape)
    return min(max(1, round(ratio * short)), short - 1)


@float32_products("ieee")
def spectra_step_(
    W: Tensor,
    M: Tensor,
    cache: SpectraCache,
    *,
    lr: Tensor | float,
    rule: SpectraRule,
    view: ShardView,
) -> SpectraStats:
    """Take the step ``W <- W - lr update_rms O / (RMS(O) + eps)`` in place, with ``q = min(m, n)``.

        U = orthonormal basis of M V,  Y = M^T U,  s_j = ||Y_j||,  V <- Y / s        num_iterations times
        tail = M - U Y^T,   s_tail = ||tail||_F / sqrt(q - k)
        O = tail + s_tail U V^T

    ``U^T tail = 0``, so that ``||O||_F^2 = ||tail||_F^2 + s_tail^2 ||V||_F^2`` needs no sum of its own.
    Directions that are lost in rounding, as all directions of a zero momentum are, count as tail and leave
    their columns of V unchanged. ``s_tail`` is never smaller than rounding: a momentum of rank k or less,
    which has no tail, steps along ``U V^T``. A zero momentum changes nothing.

    Sums over ranks: in each pass of the power iteration three where rows are sharded and two where columns
    are; and once a step one of ``(b,)`` numbers. The momentum itself is never communicated.

    Args:
        W: ``(b, p, q)`` weights, float32 or float64: whole logical matrices, or a shard of each.
        M: ``(b, p, q)`` momentum direction, same dtype; it is overwritten with O.
        cache: used, and updated in place: a replayed CUDA graph finds it where it was.
        lr: learning rate, a number or a 0-d tensor on the device.
        rule: the step's settings.
        view: the place of W and M in the whole matrices.
    """
    m, n = view.shape
    U, Y, lengths = iterate_block(M, cache.V, view, num_passes=rule.num_iterations)
    tail = M.baddbmm_(U, view.own_columns(M, Y).mT, alpha=-1)
    tail_square = view.sum(frobenius_norm(tail).square())
    norm = (tail_square + lengths.square().sum(dim=-1)).sqrt()
    rounding = _ROUNDING * torch.finfo(M.dtype).eps * norm
    floor = rounding.unsqueeze(-1)
    V = unit_columns(Y, lengths, otherwise=torch.zeros_like(Y), floor=floor)
    cache.V.copy_(unit_columns(Y, lengths, otherwise=cache.V, floor=floor))

    tail_rms = (tail_square / max(1, min(m, n) - V.size(-1))).sqrt().maximum(rounding)
    spike = U * tail_rms.to(U.dtype)[:, None, None]
    O = tail.baddbmm_(spike, view.own_columns(M, V).mT)  # noqa: E741
    num_spikes = V.double().square().sum(dim=(-2, -1))
    rms = (tail_square + tail_rms.square() * num_spikes).sqrt() / math.sqrt(m * n)
    W.addcmul_(O, (-lr * rule.update_rms / (rms + rule.eps)).to(O.dtype)[:, None, None])
    return SpectraStats(lengths, tail_rms)
