"""NaN or Inf in one rank's gradient: the step is skipped on every rank, and nothing has changed."""

import math

import pytest

from helpers.comparisons import assert_equal
from helpers.megatron_runs import MOE, tiny

SHARDED = ["--use-distributed-optimizer"]
EP2 = ["--expert-model-parallel-size", 2]
PP2 = ["--pipeline-model-parallel-size", 2]

LAYOUTS = {
    "one": (1, tiny()),
    "tp2": (2, tiny(tp=2)),
    "pp2": (2, tiny(*PP2)),
    "dp2": (2, tiny()),
    "dp2-sharded": (2, tiny(*SHARDED)),
    "moe-ep2": (2, tiny(*MOE, *EP2)),
    "bf16-sharded": (2, tiny("--bf16", *SHARDED, "--overlap-grad-reduce", "--overlap-param-gather")),
}


CASES = [(layout, what) for layout in LAYOUTS for what in ("nan linear_proj", "inf norm")]
# A copy that the gradient norm of the last rank leaves out, in the sharded optimizer of the matrices.
CASES.append(("moe-tp2-sharded", "nan router late"))
LAYOUTS["moe-tp2-sharded"] = (2, tiny(*MOE, "--sequence-parallel", *SHARDED, tp=2))


@pytest.mark.parametrize(("layout", "what"), CASES)
def test_skipped(megatron, layout, what) -> None:
    ranks, argv = LAYOUTS[layout]
    argv = [*argv, "--no-check-for-nan-in-loss-and-grad", "--train-iters", "6"]
    run = megatron.run(
        [*argv, "--spectral-run-dir", "."],
        ranks,
        calls=("probes.checkpoint_state:poison",),
        env={"POISON": what},
    )
    assert run.saved("success") == [False] * ranks
    for before, after in zip(run.saved("before"), run.saved("after"), strict=True):
        assert_equal(after, before)
    assert run.log.count("this step is skipped") == 1
    assert "number of skipped iterations:   1" in run.log
    assert all(map(math.isfinite, run.losses[3:]))
