"""Measures on the device what a step does to each logical matrix."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sso_megatron.linalg.power_iteration import power_iteration, start_basis
from sso_megatron.linalg.precision import float32_products
from sso_megatron.optimizers.batches import MatrixBatch, Member

# Passes of the power iteration from a random block and from the last measurement's, its vectors, and the
# degree of its filter.
_COLD_PASSES, _WARM_PASSES, _BLOCK, _DEGREE = 8, 2, 16, 6
# Elements whose change is in memory at a time: 64 MiB of float32.
_CHUNK = 1 << 24


class StepMeasures:
    """Collects numbers while a step is taken, without copies to the host and without communication.

    Attributes:
        parts: by name, for each logical matrix of which this rank holds rows or columns, ``(2,)`` float32:
            ``||W||_F^2`` before the step and ``||W' - W||_F^2``, both for this rank's part.
        whole: by name, for each logical matrix that this rank works on, ``SpectralOptimizer.columns`` in
            one float32 vector.
    """

    def __init__(self) -> None:
        """Start empty; a step that is not taken leaves it empty."""
        self.parts: dict[str, Tensor] = {}
        self.whole: dict[str, Tensor] = {}

    def add_parts(self, members: list[Member], new: list[Tensor]) -> None:
        """Measure this rank's part of some matrices before they are written.

        Args:
            members: whose parameters still hold the weights before the step.
            new: weights after it.
        """
        for chunk in _chunks(new):
            after = new[chunk]
            before = [m.split.read(m.param.detach()).to(after[0].dtype) for m in members[chunk]]
            norms = torch._foreach_norm(before), torch._foreach_norm(torch._foreach_sub(after, before))
            squares = torch.stack([torch.stack(column) for column in norms], dim=1).float().square()
            self.parts |= zip((m.name for m in members[chunk]), squares.unbind(), strict=True)

    def add_worked(self, batch: MatrixBatch, columns: list[Tensor]) -> None:
        """Store columns of ``(b,)`` numbers, one number for each of ``batch.here``."""
        rows = torch.stack([column.float() for column in columns], dim=1)
        self.whole |= zip((member.name for member in batch.here), rows.unbind(), strict=True)


@float32_products("ieee")
def spectral_norms(batch: MatrixBatch, W: Tensor) -> Tensor:
    """Return the ``(b,)`` spectral norms of weights, before a step that does not find them itself.

    Collectives: where the rows of ``W`` ``(b, p, q)`` are cut, one sum of ``(b, q, q)`` numbers.
    """
    all_reduce, num_passes = batch.placement.all_reduce, _WARM_PASSES
    if batch.norm_basis is None:
        batch.norm_basis = start_basis(W, _BLOCK, rows_are_cut=all_reduce is not None)
        num_passes = _COLD_PASSES
    top = power_iteration(W, batch.norm_basis, degree=_DEGREE, num_passes=num_passes, all_reduce=all_reduce)
    batch.norm_basis = top.basis
    return top.sigma


def _chunks(tensors: list[Tensor]) -> Iterator[slice]:
    """Yield runs of tensors that have at most ``_CHUNK`` elements together, or of a single tensor."""
    start = size = 0
    for index, tensor in enumerate(tensors):
        if index > start and size + tensor.numel() > _CHUNK:
            yield slice(start, index)
            start, size = index, 0
        size += tensor.numel()
    if tensors:
        yield slice(start, len(tensors))
