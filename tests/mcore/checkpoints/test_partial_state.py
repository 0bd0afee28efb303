"""Checkpoints of runs in which only some layers, experts or kinds of weights have an optimizer's state.

Megatron has the layers of one kind under one key, which must be complete; see ``stacked_keys``.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from helpers.megatron_runs import MOE, Megatron, Run, tiny
from helpers.probes.checkpoint_state import contents
from helpers.runs.reloading import Layout, assert_same_contents, assert_same_losses, leg, straight

SHARDED = "--use-distributed-optimizer"
PP2 = ("--pipeline-model-parallel-size", 2)
EP2 = ("--expert-model-parallel-size", 2)
SMALL = ("--micro-batch-size", 1)
DENSE = ["--num-layers", 4]
MIXED = [*MOE, "--num-layers", 4, "--moe-layer-freq", "[0,1,1,1]"]
ALL_MOE = [*MOE, "--num-layers", 4, "--moe-layer-freq", 1]
LAYOUTS = {
    "one": Layout(1),
    "tp2-sp": Layout(2, tp=2, flags=("--sequence-parallel",)),
    "pp2": Layout(2, flags=PP2),
    "vpp": Layout(2, flags=(*PP2, "--num-layers-per-virtual-pipeline-stage", 1, *SMALL)),
    "dp2-sharded": Layout(2, flags=(SHARDED,)),
    "tp2-dp2-sharded": Layout(4, tp=2, flags=(SHARDED, "--ckpt-fully-parallel-save", *SMALL)),
    "ep2": Layout(2, flags=EP2),
    "ep2-sharded": Layout(2, flags=(*EP2, SHARDED)),
    "grouped": Layout(1, flags=("--moe-grouped-gemm",)),
}


class Case(NamedTuple):
    """A run that saves, and the layout in which it goes on.

    Attributes:
        base: flags of the model.
        freezes: whether weights are frozen; otherwise they are excluded.
        pattern: which weights.
    """

    base: list[object]
    freezes: bool
    pattern: str
    optimizer: str
    home: str
    target: str


FREEZE, EXCLUDE = True, False
CASES = [
    Case(DENSE, EXCLUDE, r"layers\.0\.", "sso", "one", "tp2-sp"),
    Case(DENSE, EXCLUDE, r"layers\.[01]\.", "spectra", "pp2", "dp2-sharded"),
    Case(DENSE, EXCLUDE, r"layers\.2\..*linear_fc1", "spectra_clip_signum", "tp2-sp", "vpp"),
    Case(DENSE, EXCLUDE, r"layers\.[13]\..*qkv", "muon_sphere", "vpp", "tp2-dp2-sharded"),
    Case(DENSE, EXCLUDE, "linear_fc", "spectral_adam", "dp2-sharded", "pp2"),
    Case(DENSE, FREEZE, r"layers\.0\.", "sso", "tp2-dp2-sharded", "one"),
    Case(DENSE, FREEZE, r"layers\.1\.mlp\.linear_fc2", "spectra", "one", "vpp"),
    Case(DENSE, FREEZE, r"layers\.3\..*norm", "spectral_adam", "pp2", "tp2-sp"),
    Case(DENSE, FREEZE, r"layers\.0\.|layers\.2\..*fc1", "adam", "pp2", "tp2-sp"),
    Case(DENSE, FREEZE, "embedding|layers.2", "spectra_clip_signum", "dp2-sharded", "one"),
    Case(MIXED, EXCLUDE, r"layers\.1\..*router", "sso", "ep2", "grouped"),
    Case(MIXED, FREEZE, r"layers\.2\..*experts\.1\.", "muon_sphere", "one", "ep2"),
    Case(ALL_MOE, EXCLUDE, r"layers\.0\..*local_experts\.[13]\.", "spectra", "ep2-sharded", "one"),
    Case(
        ALL_MOE,
        FREEZE,
        r"experts\.(local_experts\.)?2\.|experts\.linear_fc\d\.weight2",
        "sso",
        "one",
        "ep2",
    ),
    Case(ALL_MOE, EXCLUDE, r"layers\.1\.", "spectral_adam", "grouped", "ep2-sharded"),
]


def calls_and_env(case: Case) -> dict[str, object]:
    return {"calls": ("probes.checkpoint:freeze",), "env": {"FREEZE": case.pattern}} if case.freezes else {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.optimizer}-{case.home}-{case.target}")
def test_by_value(megatron: Megatron, case: Case) -> None:
    """Exactly resumed in the same layout, and in another one the same state and the same losses."""
    base = ["--optimizer", case.optimizer, *case.base]
    base += [] if case.freezes else ["--spectral-exclude", case.pattern]
    home, target, more = LAYOUTS[case.home], LAYOUTS[case.target], calls_and_env(case)
    start = straight(megatron, home, base, save_at=2, end=4, **more)
    again = leg(megatron, home, base, start, at=2, end=4, stop=4, **more)
    assert again.losses == start.losses[2:]
    moved = leg(megatron, target, base, start, at=2, end=4, stop=4, **more)
    for run in (again, moved):
        assert_same_contents(run, start, 2)
        assert "anew" not in run.log and "found again" not in run.log
    assert_same_losses(moved, start, 2)


# ---------------------------------------------------------------- between runs of other trained weights

MASTERS = "optimizer.state.fp32_param."


def by_layer(folder: Path) -> dict[str, torch.Tensor]:
    """Optimizer state by key and layer, however the keys are divided."""
    found = {}
    for key, value in contents(folder).items():
        base, slash, layer = key.rpartition("/")
        if slash:
            found[f"{base}/{layer}"] = value
        elif ".layers." in key:
            found |= {f"{key}/{i}": one for i, one in enumerate(value)}
        else:
            found[key] = value
    return found


PARTLY = {
    "excluded": (["--spectral-exclude", r"layers\.[02]\."], {}),
    "frozen": ([], {"calls": ("probes.checkpoint:freeze",), "env": {"FREEZE": r"layers\.[02]\."}}),
    "full": ([], {}),
}


@pytest.fixture(scope="module")
def saved(megatron: Megatron) -> Callable[..., Run]:
    @functools.cache
    def run(kind: str, optimizer: str, *flags: object) -> Run:
        exclude, more = PARTLY[kind]
        base = ["--optimizer", optimizer, *DENSE, *flags, *exclude]
        return straight(megatron, Layout(2, tp=2), base, save_at=2, end=4, **more)

    return run


@pytest.mark.parametrize("target", ["one", "dp2-sharded", "pp2"])
@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        ("excluded", "full", "sso"),
        ("full", "excluded", "spectra"),
        ("frozen", "full", "sso"),
        ("full", "frozen", "spectra_clip_adamw"),
        ("frozen", "excluded", "muon_sphere"),
    ],
)
def test_what_is_missing_starts_anew(
    megatron: Megatron, saved: Callable[..., Run], target: str, before: str, after: str, optimizer: str
) -> None:
    """All that the checkpoint has is loaded by value; the rest is as at a start, and one line says so."""
    flags = ["--bf16"] if target != "pp2" else []
    start = saved(before, optimizer, *flags)
    exclude, more = PARTLY[after]
    base = ["--optimizer", optimizer, *DENSE, *flags, *exclude]
    run = leg(megatron, LAYOUTS[target], base, start, at=2, end=4, stop=4, **more)
    stored = by_layer(start.folder / "ckpt" / "iter_0000002")
    found = {k: v for k, v in by_layer(run.folder / "again").items() if k.startswith("optimizer.state.")}
    missing = found.keys() - stored.keys()
    for key, value in found.items():
        if key not in missing:
            assert torch.equal(value, stored[key]), key
        elif key.startswith(MASTERS):
            assert torch.equal(value, stored[key.removeprefix(MASTERS)].float()), key
        else:
            assert not value.any(), key
    assert run.log.count("there it starts anew") == bool(missing)
    assert bool(missing) == ((before, after) != ("full", "frozen"))


# ---------------------------------------------------------------- nothing to load, nothing to train


@pytest.mark.parametrize(
    ("optimizer", "form"), [("sso", "torch_dist"), ("adam", "torch_dist"), ("sso", "torch")]
)
def test_a_checkpoint_without_optimizer_state(megatron: Megatron, optimizer: str, form: str) -> None:
    base = ["--optimizer", optimizer, "--no-save-optim", "--ckpt-format", form]
    start = straight(megatron, Layout(2, tp=2), base, save_at=2, end=4)
    argv = tiny("--optimizer", optimizer, "--load", start.folder / "ckpt", "--ckpt-format", form, tp=2)
    run = megatron.run(argv, 2, fails=True)
    assert run.codes == [2, 2]
    errors = [line for line in run.log.splitlines() if line.startswith("sso_megatron: error: ")]
    assert len(errors) == 1
    assert errors[0].endswith(
        "/ckpt has no optimizer state, as --no-save-optim leaves it: add --no-load-optim to keep "
        "iteration and weights and start the optimizer and its learning rate schedule anew"
    )
    megatron.run([*argv, "--no-load-optim", "--train-iters", "5"], 2)


@pytest.mark.parametrize("flags", [[], [SHARDED]], ids=["plain", "sharded"])
@pytest.mark.parametrize("optimizer", ["sso", "spectra_clip_signum"])
def test_nothing_to_train(megatron: Megatron, optimizer: str, flags: list[str]) -> None:
    calls, env = ("probes.checkpoint:freeze",), {"FREEZE": "."}
    run = megatron.run(tiny(*flags, optimizer=optimizer), 2, calls, fails=True, env=env)
    assert run.codes == [2, 2]
    assert run.log.count("error: all parameters of the model are frozen; leave requires_grad") == 1
    assert "Traceback" not in run.log


@pytest.mark.parametrize("optimizer", ["sso", "adam"])
def test_a_save_that_fails_leaves_no_checkpoint(megatron: Megatron, optimizer: str) -> None:
    """Megatron makes a folder with the checkpoint's name before it saves."""
    argv = tiny("--save", "ckpt", "--save-interval", 2, optimizer=optimizer)
    run = megatron.run(argv, 2, ("probes.checkpoint:fail_in_the_second_save",), fails=True)
    assert "RuntimeError: this save fails" in run.log
    assert [path.name for path in (run.folder / "ckpt").glob("iter_*")] == ["iter_0000002"]
