"""Sharded matrices over real process groups against one rank, with uneven numbers of ranks."""

import math

import pytest
import torch


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sharded_steps_equal_whole_ones(megatron, ranks) -> None:  # type: ignore[no-untyped-def]
    """Rows or columns cut over two or three ranks; 24 is divided, 35 never is."""
    reference = megatron.run([], 1, main="probes:sharded_step").merged("whole")
    run = megatron.run([], ranks, main="probes:sharded_step")
    shapes = {"rows": (24, 35), "columns": (35, 24), "more rows": (24, 35), "uncut": (10, 14)}
    for found in run.saved("shapes"):
        assert found == shapes, "global shapes on every rank"
    for name, matrix in run.merged("whole").items():
        torch.testing.assert_close(matrix, reference[name], rtol=1e-4, atol=1e-5)
        norm = torch.linalg.matrix_norm(matrix.double(), ord=2).item()
        assert norm == pytest.approx(math.sqrt(shapes[name][0] / shapes[name][1]), rel=1e-4)
