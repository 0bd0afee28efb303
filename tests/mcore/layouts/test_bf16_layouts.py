"""Runs in bf16 in several layouts against one rank, by as much as sums in another order change there."""

import functools
from collections.abc import Callable, Sequence

import pytest
import torch

from helpers.megatron_runs import MOE, Megatron, Run, tiny
from helpers.runs.layouts import DENSE, DENSE_LAYOUTS, ITERATIONS, MOE_LAYOUTS
from helpers.runs.summation_order import MOST, WATCH, assert_within_rounding, reordered, times_rounding

MODELS: dict[str, list[object]] = {"dense": DENSE, "moe": list(MOE)}


def argv(model: str, tp: int = 1, flags: Sequence[object] = (), optimizer: str = "sso") -> list[str]:
    start = [*MODELS[model], "--bf16", "--spectral-mup-init", "--train-iters", ITERATIONS]
    return tiny(*start, *flags, tp=tp, optimizer=optimizer)


@pytest.fixture(scope="module")
def on_one_rank(megatron: Megatron) -> Callable[[str], tuple[Run, list[Run]]]:
    """A model's run on one rank, and the same with sums in other orders."""

    @functools.cache
    def train(model: str) -> tuple[Run, list[Run]]:
        return megatron.train(argv(model), calls=WATCH), reordered(megatron, argv(model))

    return train


def assert_retracted(run: Run) -> None:
    for name, (weight, radius) in run.merged("retracted").items():
        assert abs(torch.linalg.svdvals(weight.double())[0].item() - radius) <= 1e-3 * radius, name


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(("dense", name) for name in ("tp2", "tp4", "cp2", "dp2-dist", "tp2-pp2-dp2-dist")),
        *(("moe", name) for name in ("tp2-ep2-etp2", "ep2-dp2-dist", "grouped-ep2")),
    ],
)
def test_as_on_one_rank(megatron: Megatron, on_one_rank, model: str, layout: str) -> None:
    ranks, tp, flags = (DENSE_LAYOUTS | MOE_LAYOUTS)[layout]
    run = megatron.train(argv(model, tp, flags), ranks, calls=WATCH)
    assert_within_rounding(run, *on_one_rank(model))
    assert_retracted(run)


# What is wrong, then the kind of difference that tells it.
WRONG: dict[str, tuple[list[object], str, str]] = {
    "momentum": (["--sso-momentum", 0.88], "sso", "first momenta"),
    "learning rate": (["--lr", 1.1e-2], "sso", "first moves"),
    "radius": (["--sso-radius-scaler", 1.1], "sso", "first moves"),
    "algorithm": ([], "muon_sphere", "normal"),
}


@pytest.mark.parametrize("what", WRONG)
def test_other_settings_are_told(megatron: Megatron, on_one_rank, what: str) -> None:
    flags, optimizer, kind = WRONG[what]
    run = megatron.train(argv("dense", 1, flags, optimizer), calls=WATCH)
    found = times_rounding(run, *on_one_rank("dense"))
    print({kind: f"{times:.2g}" for kind, times in found.items()})
    assert found[kind] > MOST[kind]
