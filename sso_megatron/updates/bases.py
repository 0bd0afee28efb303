"""Computes the directions of elementwise optimizers, which a spectral step may clip (arXiv 2603.14315).

A base keeps a few tensors of a parameter's shape. ``update_`` takes a gradient into them; ``direction_``
then writes the ``U`` of ``W <- W - lr U``, for any part of the parameter: weight decay is left out. Both
use ``numbers``, which depend on the step alone: they are 0-d tensors on the device, so that no step waits
for it and a CUDA graph replays with the right numbers.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sso_megatron.updates.momentum import update_momentum_

Numbers = dict[str, Tensor]
"""Maps names to the numbers of a step, 0-d float64."""

States = dict[str, list[Tensor]]
"""Maps names to state tensors of one dtype: of each of some parameters, or of the same part of each."""


class Base(Protocol):
    """An elementwise optimizer that writes directions instead of taking steps.

    Attributes:
        state_names: names of the state tensors.
        looks_ahead: whether ``direction_`` needs gradients.
    """

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the state tensors."""

    @property
    def looks_ahead(self) -> bool:
        """Whether ``direction_`` needs gradients."""

    def numbers(self, step: Tensor) -> Numbers:
        """Return the numbers that step ``step``, a 0-d float64 tensor that counts from 1, uses."""

    def update_(self, states: States, gradients: list[Tensor], numbers: Numbers) -> None:
        """Update the states in place with gradients, which have the states' dtype."""

    def direction_(self, places: list[Tensor], states: States, numbers: Numbers) -> None:
        """Write directions into ``places``.

        Args:
            places: tensors of the states' dtype; where the base looks ahead they hold the gradients.
            states: states that ``update_`` has updated with this step's gradients.
            numbers: numbers of this step.
        """


@dataclass(frozen=True)
class AdamW:
    """Computes ``m_hat / (sqrt(v_hat) + eps)``, as torch's AdamW and apex's FusedAdam do.

    Attributes:
        beta1: decay of the gradient's average.
        beta2: decay of the average of its square.
        eps: added to the root, after bias correction.
    """

    beta1: float
    beta2: float
    eps: float
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    looks_ahead: ClassVar[bool] = False

    def numbers(self, step: Tensor) -> Numbers:
        """Return the bias corrections of both averages."""
        return {"first": _bias(self.beta1, step), "second": _bias(self.beta2, step)}

    def update_(self, states: States, gradients: list[Tensor], numbers: Numbers) -> None:
        """Update both moving averages."""
        torch._foreach_lerp_(states["exp_avg"], gradients, 1 - self.beta1)
        _average_squares_(states["exp_avg_sq"], gradients, self.beta2)

    def direction_(self, places: list[Tensor], states: States, numbers: Numbers) -> None:
        """Write the direction into ``places``, which takes memory for another copy of them on the way."""
        torch._foreach_copy_(places, states["exp_avg"])
        _scale_(places, 1 / numbers["first"])
        torch._foreach_div_(places, _denominators(states["exp_avg_sq"], numbers["second"], self.eps))


@dataclass(frozen=True)
class Signum:
    """Computes the sign of the momentum.

    Attributes:
        momentum: decay of the gradient's average.
        nesterov: whether to look ahead by one gradient.
    """

    momentum: float
    nesterov: bool
    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    @property
    def looks_ahead(self) -> bool:
        """Whether ``direction_`` needs gradients, as it does with Nesterov."""
        return self.nesterov

    def numbers(self, step: Tensor) -> Numbers:
        """Return no numbers: a sign has no scale to correct."""
        return {}

    def update_(self, states: States, gradients: list[Tensor], numbers: Numbers) -> None:
        """Update the moving average."""
        for momentum, gradient in zip(states["momentum_buffer"], gradients, strict=True):
            update_momentum_(momentum, gradient, self.momentum)

    def direction_(self, places: list[Tensor], states: States, numbers: Numbers) -> None:
        """Write the direction into ``places``. The sign of 0 is 0."""
        momenta = states["momentum_buffer"]
        if self.nesterov:  # (1 - beta) G + beta M
            torch._foreach_lerp_(places, momenta, self.momentum)
        else:
            torch._foreach_copy_(places, momenta)
        torch._foreach_sign_(places)


@dataclass(frozen=True)
class AdEMAMix:
    """Computes ``(m_hat + alpha m_slow) / (sqrt(v_hat) + eps)`` (arXiv 2409.03137).

    ``alpha`` grows linearly from 0; ``beta3`` grows from ``beta1``, so that the half-life of the slow
    average grows linearly (the paper's equation for the schedule of beta3). The slow average has no bias
    correction.

    Attributes:
        beta1: decay of the fast average.
        beta2: decay of the average of the squares.
        beta3: decay of the slow average after its warmup.
        alpha: weight of the slow average after its warmup.
        warmup_steps: steps of the warmup of ``alpha`` and ``beta3``, at least 1; with 1 there is none.
        eps: added to the root, after bias correction.
    """

    beta1: float
    beta2: float
    beta3: float
    alpha: float
    warmup_steps: int
    eps: float
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
    looks_ahead: ClassVar[bool] = False

    def numbers(self, step: Tensor) -> Numbers:
        """Return the bias corrections, and the warmed-up weights of the slow average."""
        share = (step / self.warmup_steps).clamp(max=1.0)
        start, end = _half_life(self.beta1), _half_life(self.beta3)
        kept = torch.pow(0.5, 1 / (start + (end - start) * share))
        return {
            "first": _bias(self.beta1, step),
            "second": _bias(self.beta2, step),
            "alpha": self.alpha * share,
            "slow_weight": 1 - kept,
        }

    def update_(self, states: States, gradients: list[Tensor], numbers: Numbers) -> None:
        """Update the three moving averages."""
        torch._foreach_lerp_(states["exp_avg_fast"], gradients, 1 - self.beta1)
        for slow, gradient in zip(states["exp_avg_slow"], gradients, strict=True):
            slow.lerp_(gradient, numbers["slow_weight"].to(slow.dtype))
        _average_squares_(states["exp_avg_sq"], gradients, self.beta2)

    def direction_(self, places: list[Tensor], states: States, numbers: Numbers) -> None:
        """Write the direction into ``places``, which takes memory for another copy of them on the way."""
        torch._foreach_copy_(places, states["exp_avg_slow"])
        _scale_(places, numbers["alpha"] * numbers["first"])
        torch._foreach_add_(places, states["exp_avg_fast"])
        _scale_(places, 1 / numbers["first"])
        torch._foreach_div_(places, _denominators(states["exp_avg_sq"], numbers["second"], self.eps))


def _bias(beta: float, step: Tensor) -> Tensor:
    """Return ``1 - beta^step``."""
    return 1 - torch.pow(beta, step)


def _half_life(beta: float) -> float:
    """Return the number of steps after which an average keeps half of what it had."""
    return math.log(0.5) / math.log(max(beta, 1e-8))


def _scale_(tensors: list[Tensor], factor: Tensor) -> None:
    if tensors:
        torch._foreach_mul_(tensors, factor.to(tensors[0].dtype))


def _average_squares_(averages: list[Tensor], gradients: list[Tensor], beta: float) -> None:
    torch._foreach_mul_(averages, beta)
    torch._foreach_addcmul_(averages, gradients, gradients, value=1 - beta)


def _denominators(averages: list[Tensor], bias: Tensor, eps: float) -> list[Tensor]:
    """Return ``sqrt(v / bias) + eps`` for each average ``v``."""
    roots = list(torch._foreach_sqrt(averages))
    _scale_(roots, bias.rsqrt())
    torch._foreach_add_(roots, eps)
    return roots
