"""Runs that go on from the checkpoint of another run, and whether they are what that run became."""

from dataclasses import dataclass
from typing import Any

import torch

from helpers.megatron_runs import Megatron, Run, tiny
from helpers.probes.checkpoint_state import contents


@dataclass(frozen=True)
class Layout:
    """Ranks and flags of a run."""

    ranks: int
    tp: int = 1
    flags: tuple[object, ...] = ()

    def argv(self, base: list[object]) -> list[str]:
        return tiny(*base, *self.flags, tp=self.tp)


def straight(
    megatron: Megatron,
    layout: Layout,
    base: list[object],
    save_at: int = 10,
    end: int = 20,
    **options: Any,
) -> Run:
    """All iterations in one go, with a checkpoint on the way."""
    save = ("--save", "ckpt", "--save-interval", save_at)
    argv = [*layout.argv([*base, "--train-iters", end]), *map(str, save)]
    return megatron.train(argv, layout.ranks, **options)


def leg(
    megatron: Megatron,
    layout: Layout,
    base: list[object],
    start: Run,
    at: int = 10,
    stop: int = 20,
    end: int = 20,
    calls: tuple[str, ...] = (),
    **options: Any,
) -> Run:
    """Train from ``start``'s checkpoint ``at`` an iteration, saved again as loaded, to one at ``stop``."""
    argv = layout.argv([*base, "--train-iters", end, "--load", start.folder / "ckpt", "--ckpt-step", at])
    if stop < end:
        argv += ["--save", "ckpt", "--save-interval", str(stop), "--exit-interval", str(stop)]
    return megatron.train(argv, layout.ranks, (*calls, "probes.checkpoint_state:saved_again"), **options)


def assert_same_contents(run: Run, start: Run, iteration: int) -> None:
    """What was loaded, written again, is what was saved: every tensor and object by value."""
    saved = contents(start.folder / "ckpt" / f"iter_{iteration:07d}")
    found = contents(run.folder / "again")
    kept = any(key.startswith("optimizer.spectral.") for key in saved)
    # Spectral clipping alone keeps nothing of a hidden matrix but what it keeps of the output layer, too.
    states = [key.split(".")[2:] for key in saved if key.startswith("optimizer.state.")]
    names = [{name for name, *key in states if part in key} for part in ("output_layer", "linear_proj")]
    assert kept or names[0] == names[1]
    assert found.keys() == {key for key in saved if key.startswith(("decoder", "optim", "embed", "output"))}
    for key, value in found.items():
        if isinstance(value, dict):
            assert value.keys() == saved[key].keys()
            assert all(torch.equal(value[name], saved[key][name]) for name in value), key
        else:
            assert value.any() or "layer_norm" in key or not saved[key].any(), key
            assert torch.equal(value, saved[key]), key


def assert_same_losses(run: Run, straight: Run, start: int) -> None:
    wanted = straight.losses[start : start + len(run.losses)]
    worst = max(abs(a - b) / b for a, b in zip(run.losses, wanted, strict=True))
    print(f"losses within {worst:.1e}")
    assert worst <= 1e-4


def go_on(
    megatron: Megatron, layout: Layout, base: list[object], start: Run, at: int = 10, **options: Any
) -> Run:
    """``start`` from a checkpoint on in another layout: loaded by value, and the same losses."""
    run = leg(megatron, layout, base, start, at, **options)
    assert_same_contents(run, start, at)
    assert_same_losses(run, start, at)
    return run
