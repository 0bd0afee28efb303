"""Checkpoints of real Megatron runs: gone on with to the last bit in the same layout."""

import pytest
import torch
from conftest import MOE, Megatron, Run, tiny

SHARDED = ["--use-distributed-optimizer"]
PP2 = ["--pipeline-model-parallel-size", 2]
VIRTUAL = ["--num-layers-per-virtual-pipeline-stage", 1]
EP2 = ["--expert-model-parallel-size", 2]
WATCH = ("probes:weights", "checkpoint_state_probes:loaded")
SAVE = ["--save", "ckpt", "--save-interval", 10, "--exit-interval", 10]


def resumed(megatron: Megatron, argv: list[str], ranks: int) -> tuple[Run, Run, Run]:
    """20 iterations in one go, the first 10 with a checkpoint, and the others from it."""
    argv = [*argv, "--spectral-run-dir", "."]
    calls = ("checkpoint_state_probes:state",)
    straight = megatron.run(argv, ranks, calls)
    first = megatron.run([*argv, *map(str, SAVE)], ranks, calls)
    second = megatron.run([*argv, "--load", str(first.folder / "ckpt")], ranks, calls)
    return straight, first, second


def assert_equal(found: object, wanted: object, where: str = "") -> None:
    """To the last bit, all the way down."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_equal(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), where
    else:
        assert found == wanted, where


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


@pytest.mark.parametrize(("case", "optimizer"), OPTIMIZERS)
def test_bit_for_bit(megatron, case, optimizer) -> None:  # type: ignore[no-untyped-def]
    ranks, argv = CASES[case]
    argv = [*argv, "--train-iters", "20", "--optimizer", optimizer]
    straight, first, second = resumed(megatron, argv, ranks)
    assert first.losses + second.losses == straight.losses
    for found, wanted in zip(second.saved("loaded"), first.saved("state"), strict=True):
        assert_equal(found, wanted)
    for found, wanted in zip(second.saved("state"), straight.saved("state"), strict=True):
        assert wanted["spectral"] and any("momentum_buffer" in name for name in wanted["held"])
        assert_equal(found, wanted)
    assert "found again from the weights" not in second.log
