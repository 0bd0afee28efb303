"""Functions that a rank runs to sum in another order, as other layouts do, and to keep its first steps."""

import functools
from typing import Any

import torch

from helpers.probes import momenta, save, spectral_optimizers, whole_weights


def sum_in_halves() -> None:
    """One rank's products as two ranks of tensor parallelism make them."""
    _sum_in_parts(2)


def sum_in_quarters() -> None:
    """One rank's products as four ranks of tensor parallelism make them."""
    _sum_in_parts(4)


def _sum_in_parts(num_parts: int) -> None:
    """Cut every linear layer as tensor parallelism does, and round each part of a sum by itself.

    A row-parallel layer adds parts of its output; a column-parallel one parts of its input's gradient,
    which autograd does, since its input is used once a part.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    whole_columns, whole_rows = ColumnParallelLinear._forward_impl, RowParallelLinear._forward_impl

    def columns(self: Any, input: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        parts = (whole_columns(self, input=input, weight=w, **kwargs) for w in weight.chunk(num_parts))
        return torch.cat(list(parts), dim=-1)

    def rows(self: Any, input: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        cut = zip(input.chunk(num_parts, -1), weight.chunk(num_parts, -1), strict=True)
        return sum(whole_rows(self, input=x, weight=w, **kwargs) for x, w in cut)

    ColumnParallelLinear._forward_impl, RowParallelLinear._forward_impl = columns, rows


def first_steps() -> None:
    """Save whole weights after iterations 1 and 2, and momenta after 2: the first has no learning rate."""
    from megatron.training import training

    train_step, count = training.train_step, 0

    @functools.wraps(train_step)
    def watched(forward_step: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        result = train_step(forward_step, data, model, optimizer, *args, **kwargs)
        count += 1
        if count <= 2:
            save(f"weights after {count} of rank ", whole_weights(spectral_optimizers(optimizer)))
        if count == 2:
            save("momentum after 2 of rank ", momenta(optimizer))
        return result

    training.train_step = watched
