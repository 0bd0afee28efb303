"""All-gathers that start while the spectral optimizer steps: same bits, one order, no step half-way."""

import pytest

from helpers.comparisons import assert_equal
from helpers.megatron_runs import MOE, Run, tiny

SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--ddp-bucket-size", "20000"]
BASE = ["--spectral-mup-init", *SHARDED]
DEEP = ["--num-layers", 4]
INTERLEAVED = ["--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1]
WATCH = ("probes.checkpoint_state:state", "probes.layer_wise:shards", "probes.layer_wise:gathers")
LATE = ("probes.layer_wise:gather_late",)

LAYOUTS = {
    "dp2": (2, tiny(*BASE, *DEEP)),
    "dp2-bf16": (2, tiny(*BASE, *DEEP, "--bf16")),
    "tp2-dp2": (4, tiny(*BASE, *DEEP, tp=2)),
    "tp2-dp2-bf16": (4, tiny(*BASE, "--bf16", tp=2)),
    "ep2-dp2": (4, tiny(*MOE, *BASE, "--expert-model-parallel-size", 2, "--micro-batch-size", 1)),
    "pp2-vpp2-dp2": (4, tiny(*BASE, *DEEP, *INTERLEAVED, "--micro-batch-size", 1)),
    # One query group over four ranks: heads of which a rank holds nothing, and neither works on.
    "tp4-bf16": (4, tiny(*BASE, "--bf16", "--num-query-groups", 1, tp=4)),
    # Two matrices for four ranks.
    "no-matrix": (4, tiny(*BASE, "--num-layers", 1, "--spectral-exclude", "mlp", "--micro-batch-size", 1)),
}


def gathered(events: list[str]) -> list[str]:
    return [event for event in events if event.startswith("gather")]


def assert_early(run: Run) -> None:
    """From the second step on each bucket is gathered once, in one order on all ranks of a stage."""
    orders: dict[int, list[str]] = {}
    for place, steps in zip(run.saved("place"), run.saved("gathers"), strict=True):
        assert not gathered(steps[0]), "NCCL makes its connections in the first step"
        for events in steps[1:]:
            order = gathered(events)
            assert len(set(order)) == len(order)
            assert any("matrices" in label for label in order)
            assert orders.setdefault(place["pp"], order) == order
            end = events.index("stepped") + 1
            assert gathered(events[:end]) == order, "each is started within the spectral step"
            assert events[end:] == [f"end of {label}" for label in order]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_as_after_the_step(megatron, layout) -> None:
    ranks, argv = LAYOUTS[layout]
    early = megatron.train(argv, ranks, calls=WATCH)
    late = megatron.train(argv, ranks, calls=(*LATE, *WATCH))
    assert early.losses == late.losses
    for name in ("state", "model"):
        for got, expected in zip(early.saved(name), late.saved(name), strict=True):
            assert_equal(got, expected)
    assert_early(early)
    assert not any(gathered(events) for steps in late.saved("gathers") for events in steps)
    if layout == "no-matrix":
        assert sorted(map(len, early.saved("owned"))) == [0, 0, 1, 8]
    if layout.startswith("dp2"):
        for steps in early.saved("gathers"):
            # AdamW's bucket, then the first layer's matrices before the last batch is begun.
            first, *batches = [e for e in steps[-1] if e == "batch" or e in gathered(steps[-1])[:2]]
            assert first == "gather 0 dense others 0"
            assert batches.index("gather 0 dense matrices 4") < len(batches) - 1


def test_overlap_with_the_forward_pass(megatron) -> None:
    run = megatron.train([*LAYOUTS["dp2"][1], "--overlap-param-gather"], 2, calls=WATCH)
    assert not any(gathered(events) for steps in run.saved("gathers") for events in steps)


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_a_skipped_step_starts_nothing(megatron, precision) -> None:
    argv = [*LAYOUTS["dp2"][1], *precision, "--no-check-for-nan-in-loss-and-grad", "--train-iters", "5"]
    calls = ("probes.checkpoint_state:poison", "probes.layer_wise:gathers")
    run = megatron.run(argv, 2, calls=calls, env={"POISON": "nan linear_proj"})
    assert run.saved("success") == [False] * 2
    for before, after in zip(run.saved("before"), run.saved("after"), strict=True):
        assert_equal(after, before)
    for steps in run.saved("gathers"):
        assert [bool(gathered(events)) for events in steps] == [False, True, False, True, True]
        assert not steps[2]


def test_an_error_in_a_step(megatron) -> None:
    """The rank that fails ends, with gathers under way; the launcher ends the other, as ever."""
    calls = ("probes.layer_wise:fail_in_a_step",)
    run = megatron.run(LAYOUTS["dp2"][1], 2, calls=calls, fails=True, grace=5)
    assert run.codes[1] == 1
    assert run.codes[0] != 0
    assert "out of something" in run.log
