"""Checkpoints of real Megatron runs: gone on with to the last bit in the same layout."""

import functools
from collections.abc import Callable

import pytest

from helpers.comparisons import assert_equal
from helpers.megatron_runs import FAMILY, MOE, Megatron, Run, tiny

SHARDED = ["--use-distributed-optimizer"]
PP2 = ["--pipeline-model-parallel-size", 2]
VIRTUAL = ["--num-layers-per-virtual-pipeline-stage", 1]
EP2 = ["--expert-model-parallel-size", 2]


CASES = {
    "dense": (1, tiny()),
    "dense-dp2": (2, tiny(*SHARDED)),
    "tp2": (2, tiny(tp=2)),
    "moe-ep2": (2, tiny(*MOE, *EP2)),
    "moe-ep2-dp2": (4, tiny(*MOE, *EP2, *SHARDED, "--micro-batch-size", 1)),
    "bf16-dp2": (2, tiny("--bf16", *SHARDED)),
    "bf16-tp2": (2, tiny("--bf16", tp=2)),
    "from-weights-pp2": (2, tiny("--sso-radius-mode", "from_weights", "--pipeline-model-parallel-size", 2)),
    "format-torch": (2, tiny("--ckpt-format", "torch", tp=2)),
    "tp2-distributed": (2, tiny("--spectral-tp-mode", "distributed", tp=2)),
    "tp2-blockwise": (2, tiny("--spectral-tp-mode", "blockwise", tp=2)),
    "virtual-stages": (2, [*tiny(*PP2, "--num-layers", 4, *VIRTUAL), "--micro-batch-size", "1"]),
    "tied": (2, [flag for flag in tiny(*PP2) if flag != "--untie-embeddings-and-output-weights"]),
    "one-writer": (2, tiny("--no-ckpt-fully-parallel-save", *SHARDED)),
}


OPTIMIZERS = [(case, "sso") for case in CASES]
OPTIMIZERS += [(case, "muon_sphere") for case in ("dense", "dense-dp2", "moe-ep2", "moe-ep2-dp2")]
OPTIMIZERS += [(case, name) for case in ("tp2", "dense-dp2") for name in FAMILY]
# Counters of steps, which Megatron compares; a momentum beside float32 masters.
OPTIMIZERS += [("format-torch", "spectral_adam"), ("format-torch", "spectra_clip_adamw")]
OPTIMIZERS += [("bf16-tp2", "spectra"), ("bf16-dp2", "spectra_clip_ademamix")]


@pytest.fixture(scope="module")
def train(megatron: Megatron) -> Callable[..., Run]:
    """A function that trains a case up to iteration 20 with further flags, once for the same ones."""

    @functools.cache
    def run(case: str, optimizer: str, *flags: object) -> Run:
        ranks, argv = CASES[case]
        flags = (*flags, *FAMILY.get(optimizer, []))
        argv = [*argv, "--train-iters", "20", "--optimizer", optimizer, *map(str, flags)]
        return megatron.train(argv, ranks, ("probes.checkpoint_state:state",))

    return run


# What each keeps of a parameter, if not a momentum alone.
STATE = {
    "spectra_clip_adamw": {"exp_avg", "exp_avg_sq"},
    "spectra_clip_ademamix": {"exp_avg_fast", "exp_avg_slow", "exp_avg_sq"},
    "spectral_adam": {"exp_avg", "exp_avg_sq"},
}
SAVE = ("--save", "ckpt", "--save-interval", 10)


@pytest.mark.parametrize(("case", "optimizer"), OPTIMIZERS)
def test_bit_for_bit(train: Callable[..., Run], case: str, optimizer: str) -> None:
    """A run that saves on its way, and the half after that again from its checkpoint."""
    straight = train(case, optimizer, *SAVE)
    second = train(case, optimizer, "--load", straight.folder / "ckpt", "--ckpt-step", 10)
    assert second.losses == straight.losses[10:]
    for found, wanted in zip(second.saved("loaded"), straight.saved("at10-"), strict=True):
        assert_equal(found, wanted)
    for found, wanted in zip(second.saved("state"), straight.saved("state"), strict=True):
        assert wanted["spectral"] or optimizer.startswith("spectra_clip")
        assert set(wanted["ours"]) == STATE.get(optimizer, {"momentum_buffer"})
        assert_equal(found, wanted)
    assert "found again" not in second.log


@pytest.mark.parametrize("case", ["tp2", "dense-dp2"])
def test_saving_changes_nothing(train: Callable[..., Run], case: str) -> None:
    """A run that saves on its way is one that does not, whole parameters and sharded ones."""
    saving, plain = train(case, "sso", *SAVE), train(case, "sso")
    assert saving.losses == plain.losses
    for found, wanted in zip(saving.saved("state"), plain.saved("state"), strict=True):
        assert_equal(found, wanted)


@pytest.mark.parametrize("strictness", ["raise_unexpected", "log_unexpected", "log_all", "ignore_all"])
@pytest.mark.parametrize("optimizer", ["sso", "adam"])
def test_strictness(train: Callable[..., Run], optimizer: str, strictness: str) -> None:
    """Megatron hands ``torch.empty`` what this does not take; ``test_refusals.py`` has the other values."""
    straight = train("tp2", optimizer, *SAVE)
    load = ("--load", straight.folder / "ckpt", "--ckpt-step", 10)
    second = train("tp2", optimizer, *load, "--dist-ckpt-strictness", strictness)
    assert second.losses == straight.losses[10:]


def test_another_schedule_is_one_line(megatron: Megatron, train: Callable[..., Run]) -> None:
    """Megatron's AdamW cannot go on with another rate: it finds its parameter groups by their rates."""
    straight = train("tp2", "sso", *SAVE)
    argv = tiny("--train-iters", 20, "--load", straight.folder / "ckpt", "--lr", 2e-2, tp=2)
    error = only_error(megatron.run(argv, 2, fails=True))
    assert "the checkpoint has another schedule (class input value 0.02 and checkpoint" in error
    assert "--override-opt-param-scheduler, to go on with those of this run" in error
    megatron.run([*argv, "--override-opt-param-scheduler"], 2)
    megatron.run([*argv, "--use-checkpoint-opt-param-scheduler"], 2)
    straight = train("tp2", "adam", *SAVE)
    argv = tiny("--load", straight.folder / "ckpt", "--lr", 2e-2, tp=2, optimizer="adam")
    error = only_error(megatron.run(argv, 2, fails=True))
    assert "the checkpoint's optimizer has parameter groups with other settings" in error


def only_error(run: Run) -> str:
    assert set(run.codes) == {2}
    (line,) = [line for line in run.log.splitlines() if line.startswith("sso_megatron: error: ")]
    return line
