"""Takes a step of SpectralAdam on a batch: AdamW, at times on the gradient divided by its spectral norm.

The gradient is divided when its Frobenius norm has just jumped, and every so many steps. In other steps
AdamW gets it unchanged, so that its averages mix gradients of two scales; that is how it was published.

The same body works on whole matrices and on shards of them, along rows or along columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sso_megatron.linalg.block_iteration import iterate_block, unit_columns
from sso_megatron.linalg.polar import frobenius_norm
from sso_megatron.linalg.precision import float32_products
from sso_megatron.linalg.shard_view import ShardView


@dataclass(frozen=True)
class SpectralAdamRule:
    """The settings of a step that do not change from matrix to matrix.

    Attributes:
        high: ratio of the gradient's Frobenius norm to the last one's above which the gradient is divided.
        low: ratio of these norms below which the gradient is divided.
        period: steps from one division to the next at most.
        beta1: decay of the gradient's moving average.
        beta2: decay of the moving average of its square.
        eps: added to the root of the second average, and to the norm that another norm is divided by.
    """

    high: float
    low: float
    period: int
    beta1: float
    beta2: float
    eps: float


@dataclass
class SpectralAdamCache:
    """State of a batch from step to step, beside AdamW's averages.

    Attributes:
        v: ``(b, n, 1)`` right singular vector of the gradient, whole on every rank; started by
            ``find_block``.
        norm: ``(b,)`` float64 Frobenius norm of the last gradient that was not zero; 0 before the
            first, NaN where it is not known: in such a step ``period`` alone decides.
    """

    v: Tensor
    norm: Tensor


@dataclass(frozen=True)
class SpectralAdamStats:
    """Numbers that a step found, on the device; nothing is synchronised.

    Attributes:
        sigma: ``(b,)`` the gradient's spectral norm by one power iteration.
        ratio: ``(b,)`` ratio of its Frobenius norm to the last one's.
        divided: ``(b,)`` whether the gradient was divided by ``sigma``.
    """

    sigma: Tensor
    ratio: Tensor
    divided: Tensor


@float32_products("ieee")
def spectral_adam_step_(
    W: Tensor,
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    cache: SpectralAdamCache,
    *,
    lr: Tensor | float,
    rule: SpectralAdamRule,
    view: ShardView,
) -> SpectralAdamStats:
    """Take AdamW's step in place, without its weight decay, on ``G`` or ``G / sigma(G)``.

    ``G`` is divided when the ratio of ``||G||_F`` to the last one is above ``high`` or below ``low``, in
    the first step therefore, and at steps ``period``, ``2 period`` and so on. A zero gradient is
    not divided.

    Sums over ranks: those of a pass of ``iterate_block`` with one column, and one of ``(b,)`` numbers.

    Args:
        W: ``(b, p, q)`` weights, float32 or float64: whole logical matrices, or a shard of each.
        G: ``(b, p, q)`` gradient, same dtype; it is overwritten.
        exp_avg: ``(b, p, q)`` moving average, same dtype, updated.
        exp_avg_sq: ``(b, p, q)`` moving average of the squares, same dtype, updated.
        step: number of this step, from 1; 0-d, floating point.
        cache: used, and updated in place.
        lr: learning rate, a number or a 0-d tensor on the device.
        rule: the step's settings.
        view: the place of W and G in the whole matrices.
    """
    norm = view.sum(frobenius_norm(G).square()).sqrt()
    _, y, lengths = iterate_block(G, cache.v, view)
    sigma = lengths[:, 0]
    ratio = norm / (cache.norm + rule.eps)
    has_jumped = (ratio > rule.high) | (ratio < rule.low)
    divides = (has_jumped | (step.remainder(rule.period) == 0)) & (sigma > torch.finfo(G.dtype).tiny)
    cache.v.copy_(unit_columns(y, lengths, otherwise=cache.v))
    cache.norm.copy_(torch.where(norm > 0, norm, cache.norm))

    G.mul_(_of(torch.where(divides, 1 / sigma, 1.0), G))
    exp_avg.lerp_(G, 1 - rule.beta1)
    exp_avg_sq.mul_(rule.beta2).addcmul_(G, G, value=1 - rule.beta2)
    step = step.double()
    root = torch.sqrt(exp_avg_sq, out=G).div_((1 - rule.beta2**step).sqrt().to(G.dtype)).add_(rule.eps)
    W.sub_(torch.div(exp_avg, root, out=root).mul_((lr / (1 - rule.beta1**step)).to(G.dtype)))
    return SpectralAdamStats(sigma, ratio, divides)


def _of(numbers: Tensor, X: Tensor) -> Tensor:
    """Return ``(b,)`` numbers shaped as factors of the matrices ``(b, p, q)``, in their dtype."""
    return numbers.to(X.dtype)[:, None, None]
