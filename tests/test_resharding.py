"""Checkpoints loaded in another layout: the same state, and the same run from there on."""

from dataclasses import dataclass

import pytest
import torch
from checkpoint_state_probes import contents
from conftest import MOE, Megatron, Run, tiny

SHARDED = ["--use-distributed-optimizer"]
PP2 = ["--pipeline-model-parallel-size", 2]
EP2 = ["--expert-model-parallel-size", 2]
SMALL = ["--micro-batch-size", 1]


@dataclass(frozen=True)
class Layout:
    """Ranks and flags of a run."""

    ranks: int
    tp: int = 1
    flags: tuple[object, ...] = ()

    def argv(self, base: list[object]) -> list[str]:
        return tiny(*base, *self.flags, tp=self.tp)


def leg(
    megatron: Megatron, layout: Layout, base: list[object], stop: int, start: Run | None, save: bool
) -> Run:
    """Train from ``start``'s checkpoint to iteration ``stop``, and save the checkpoint as loaded."""
    argv = [*layout.argv([*base, "--train-iters", 20]), "--spectral-run-dir", "."]
    if start is not None:
        argv += ["--load", str(start.folder / "ckpt")]
    if save:
        argv += ["--save", "ckpt", "--save-interval", str(stop), "--exit-interval", str(stop)]
    calls = () if start is None else ("checkpoint_state_probes:saved_again",)
    return megatron.run(argv, layout.ranks, calls)


def assert_same_contents(run: Run, start: Run, iteration: int) -> None:
    """What was loaded, written again, is what was saved: every tensor and object by value."""
    saved = contents(start.folder / "ckpt" / f"iter_{iteration:07d}")
    found = contents(run.folder / "again")
    assert any(key.startswith("optimizer.spectral.") for key in saved)
    assert found.keys() == {key for key in saved if key.startswith(("decoder", "optim", "embed", "output"))}
    for key, value in found.items():
        if isinstance(value, dict):
            assert value.keys() == saved[key].keys()
            assert all(torch.equal(value[name], saved[key][name]) for name in value), key
        else:
            assert value.any() or "layer_norm" in key or not saved[key].any(), key
            assert torch.equal(value, saved[key]), key


def assert_same_losses(run: Run, straight: Run, start: int, tolerance: float) -> None:
    wanted = straight.losses[start : start + len(run.losses)]
    worst = max(abs(a - b) / b for a, b in zip(run.losses, wanted, strict=True))
    print(f"losses within {worst:.1e}")
    assert worst <= tolerance


class Saved:
    """A run in one go and its first half with a checkpoint, made when first asked for."""

    def __init__(self, megatron: Megatron, layout: Layout, base: list[object]) -> None:
        self.base = base
        self.straight = leg(megatron, layout, base, 20, None, save=False)
        self.first = leg(megatron, layout, base, 10, None, save=True)


@pytest.fixture(scope="module")
def tp2_pp2(megatron: Megatron) -> Saved:
    return Saved(megatron, Layout(4, tp=2, flags=(*PP2,)), [])


TARGETS = {
    "tp1": Layout(1),
    "tp4": Layout(4, tp=4),  # cuts the two query groups
    "dp2": Layout(2),
    "dp2-sharded": Layout(2, flags=(*SHARDED,)),
    "pp2-dp2-sharded": Layout(4, flags=(*PP2, *SHARDED, "--ckpt-fully-parallel-load")),
    "tp2-distributed": Layout(2, tp=2, flags=("--spectral-tp-mode", "distributed")),
    "tp2-pp2-duplicated": Layout(4, tp=2, flags=(*PP2, "--spectral-tp-mode", "duplicated")),
}


@pytest.mark.parametrize("target", TARGETS)
def test_dense(megatron, tp2_pp2, target) -> None:  # type: ignore[no-untyped-def]
    run = leg(megatron, TARGETS[target], tp2_pp2.base, 20, tp2_pp2.first, save=False)
    assert_same_contents(run, tp2_pp2.first, 10)
    assert_same_losses(run, tp2_pp2.straight, 10, 1e-4)


@pytest.mark.parametrize("optimizer", ["muon_sphere"])
def test_another_optimizer(megatron, optimizer) -> None:  # type: ignore[no-untyped-def]
    saved = Saved(megatron, Layout(2, flags=(*SHARDED,)), ["--optimizer", optimizer])
    run = leg(megatron, Layout(2, tp=2), saved.base, 20, saved.first, save=False)
    assert_same_contents(run, saved.first, 10)
    assert_same_losses(run, saved.straight, 10, 1e-4)


def test_masters_of_bfloat16(megatron) -> None:  # type: ignore[no-untyped-def]
    """Sharded and not: float32 masters and moments by value, losses as bfloat16 allows."""
    saved = Saved(megatron, Layout(2, flags=(*SHARDED,)), ["--bf16"])
    run = leg(megatron, Layout(2, tp=2), saved.base, 20, saved.first, save=False)
    assert_same_contents(run, saved.first, 10)
    assert_same_losses(run, saved.straight, 10, 4e-3)


def test_singular_vectors_of_the_other_side_are_found_again(megatron) -> None:  # type: ignore[no-untyped-def]
    """Cut columns keep left singular vectors, whole square matrices right ones."""
    saved = Saved(megatron, Layout(2, tp=2, flags=("--spectral-tp-mode", "distributed")), [])
    run = leg(megatron, Layout(1), saved.base, 20, saved.first, save=False)
    assert_same_contents(run, saved.first, 10)
    assert_same_losses(run, saved.straight, 10, 1e-4)
    assert run.log.count("they are found again from the weights") == 1
    back = leg(
        megatron,
        Layout(2, tp=2, flags=("--spectral-tp-mode", "distributed")),
        saved.base,
        20,
        saved.first,
        save=False,
    )
    assert "they are found again from the weights" not in back.log


EXPERTS = {
    "plain": ([], []),
    "sharded": (SHARDED, SHARDED),
    "sharded-and-back": (SHARDED, []),
}


@pytest.mark.parametrize("who", EXPERTS)
@pytest.mark.parametrize("exclude", [[], ["--spectral-exclude", "local_experts"]], ids=["sso", "adamw"])
def test_experts(megatron, who, exclude) -> None:  # type: ignore[no-untyped-def]
    """EP 2, EP 1, EP 2; experts under SSO, and under AdamW, whose groups know of expert parallelism."""
    at_ep2, at_ep1 = EXPERTS[who]
    base = [*MOE, *exclude]
    wide = Layout(2, flags=(*EP2, *at_ep2))
    straight = leg(megatron, wide, base, 20, None, save=False)
    first = leg(megatron, wide, base, 8, None, save=True)
    second = leg(megatron, Layout(1, flags=(*at_ep1,)), base, 14, first, save=True)
    third = leg(megatron, wide, base, 20, second, save=False)
    assert_same_contents(second, first, 8)
    assert_same_contents(third, second, 14)
    assert_same_losses(second, straight, 8, 1e-4)
    assert_same_losses(third, straight, 14, 1e-4)


@pytest.mark.parametrize(("before", "after"), [([], ["--moe-grouped-gemm"]), (["--moe-grouped-gemm"], [])])
def test_experts_one_by_one_and_grouped(megatron, before, after) -> None:  # type: ignore[no-untyped-def]
    saved = Saved(megatron, Layout(2, flags=(*EP2, *before)), [*MOE])
    run = leg(megatron, Layout(1, flags=(*after,)), saved.base, 20, saved.first, save=False)
    assert_same_contents(run, saved.first, 10)
    assert_same_losses(run, saved.straight, 10, 1e-4)


def test_expert_tensor_parallelism(megatron) -> None:  # type: ignore[no-untyped-def]
    saved = Saved(
        megatron,
        Layout(4, tp=2, flags=(*EP2, "--expert-tensor-parallel-size", 2, "--sequence-parallel", *SMALL)),
        [*MOE],
    )
    for target in (
        Layout(2, tp=2, flags=("--expert-tensor-parallel-size", 1, "--sequence-parallel", *SHARDED)),
        Layout(1),
    ):
        run = leg(megatron, target, saved.base, 20, saved.first, save=False)
        assert_same_contents(run, saved.first, 10)
        assert_same_losses(run, saved.straight, 10, 1e-4)
