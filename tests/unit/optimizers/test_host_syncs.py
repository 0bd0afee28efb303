"""A step never waits for the device, but for the very first; by two guards that share no code."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.megatron_runs import Megatron
from helpers.numerics.host_reads import NoHostReads
from sso_megatron import SSO, MuonSphere, Spectra, SpectralAdam, SpectralClip
from sso_megatron.cli.bench.meters import HostSyncs
from sso_megatron.optimizers.measures import StepMeasures

SHAPES = [(96, 96), (96, 96), (128, 80), (80, 128), (192, 48), (48, 192), (8, 8), (40, 1)]


ONE, X = torch.tensor(1), torch.eye(3)
READS: dict[str, Callable[[], Any]] = {
    "item": lambda: ONE.item(),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "nonzero": lambda: X.nonzero(),
    "__bool__": lambda: "yes" if ONE > 0 else "no",
    "__bool__ of all": lambda: not (X > 0).all(),
    "__bool__ by max": lambda: max(ONE, ONE),
    "__int__": lambda: int(ONE),
    "__float__": lambda: float(ONE),
    "__index__": lambda: [1, 2][ONE],
    "__index__ of a range": lambda: range(ONE),
    "where": lambda: torch.where(X > 0),
    "cpu": lambda: X.cpu(),
}


@pytest.mark.parametrize("name", READS)
def test_the_guards_trip(name: str) -> None:
    with pytest.raises(AssertionError, match=name.split()[0]), NoHostReads():
        READS[name]()
    with HostSyncs() as syncs:
        READS[name]()
    assert syncs.count >= 1


def make(kind: Any, device: str = "cpu", **settings: Any) -> Callable[[], None]:
    """An optimizer of many shapes after its first step; each call gives it gradients, and steps."""
    gen = torch.Generator(device).manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device=device, generator=gen)) for shape in SHAPES]
    optimizer = kind(params, lr=0.02, **settings)

    def step() -> None:
        for param in params:
            param.grad = torch.randn(param.shape, device=device, generator=gen)
        optimizer.step()

    step()
    return step


KINDS = [
    pytest.param(SSO, {}, id="sso"),
    pytest.param(SSO, {"solver_trials": 4}, id="four trials"),
    pytest.param(SSO, {"tangent": "project"}, id="project"),
    pytest.param(SSO, {"retract_mode": "dynamic"}, id="dynamic"),
    pytest.param(SSO, {"radius_mode": "from_weights"}, id="from weights"),
    pytest.param(MuonSphere, {}, id="muon_sphere"),
]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_no_host_synchronisation_after_the_first_step(kind: Any, settings: dict[str, Any]) -> None:
    step = make(kind, **settings)
    for _ in range(3):
        with HostSyncs() as syncs:
            step()
        assert syncs.count == 0, syncs.sources
        with NoHostReads():
            step()


@pytest.mark.parametrize("kind", [SSO, MuonSphere, Spectra, SpectralClip, SpectralAdam])
def test_a_measured_step_waits_no_more(kind: Any) -> None:
    step = make(kind)
    (optimizer,) = (cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "step"))
    for measures in (StepMeasures(), StepMeasures()):
        optimizer.measures = measures
        with HostSyncs() as syncs, NoHostReads():
            step()
        assert syncs.count == 0, syncs.sources
        assert len(measures.parts) == len(measures.whole) == len(SHAPES)


def test_bisection_does_wait() -> None:
    """So a count of zero is no accident of the meter."""
    step = make(SSO, solver="bisection")
    with HostSyncs() as syncs:
        step()
    assert syncs.count > 1
    with pytest.raises(AssertionError, match="nonzero"), NoHostReads():
        step()


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_cuda_itself_finds_no_synchronisation(kind: Any, settings: dict[str, Any]) -> None:
    step = make(kind, "cuda", **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("settings", [{}, {"tangent": "none"}], ids=["sso", "muon_sphere"])
@pytest.mark.parametrize("mode", ["duplicated", "owner", "distributed"])
def test_no_host_synchronisation_on_two_ranks(megatron: Megatron, mode: str, settings: Any) -> None:
    shapes = {"rows": [36, 24, 0, None], "columns": [24, 36, 1, None], "whole": [10, 14, None, None]}
    matrices = shapes | {f"layer {i}": [36, 24, 0, None] for i in range(3)}
    task = {"matrices": matrices, "mode": mode, "steps": 6, "gradients": "noise", "settings": settings}
    run = megatron.run([json.dumps(task)], 2, main="tasks.parallel:train_guarded")
    assert all(set(modes.values()) == {"local", mode} for modes in run.saved("modes"))
    for first, *others in run.saved("syncs"):
        assert first, "the look at the radii"
        assert others == [{}] * 5
