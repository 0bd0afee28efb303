"""Starting a spectral optimizer from another optimizer's checkpoint."""

import json

import pytest
import torch

from helpers.megatron_runs import Megatron, Run, tiny
from helpers.probes.checkpoint_state import contents

SHORT = ["--train-iters", 14, "--lr-decay-style", "constant", "--lr-warmup-iters", 0, "--lr", "1e-3"]


def stop_at(iteration: int) -> list[object]:
    return ["--save", "ckpt", "--save-interval", iteration, "--exit-interval", iteration]


@pytest.fixture(scope="module")
def adamw(megatron: Megatron) -> Run:
    # Initial weights far from the spheres of spectral_mup.
    return megatron.train(tiny(*SHORT, *stop_at(10), "--init-method-std", 0.2, optimizer="adam"))


def norms_over_radius(run: Run) -> tuple[float, float]:
    """Smallest and largest, as the first step found them."""
    record = json.loads((run.folder / "measures.jsonl").read_text().splitlines()[1])
    errors = record["matrices"]["radius_error"]
    return 1 + min(errors), 1 + max(errors)


def go_on(
    megatron: Megatron, start: Run, *flags: object, ranks: int = 1, tp: int = 1, optimizer: str = "sso"
) -> Run:
    measured = ["--log-spectral-metrics", 1]
    argv = tiny(*SHORT, "--load", start.folder / "ckpt", *measured, *flags, tp=tp, optimizer=optimizer)
    return megatron.train(argv, ranks, calls=("probes:weights",))


@pytest.mark.parametrize("tp", [1, 2])
def test_radius_from_weights(megatron, adamw, tp) -> None:
    """Each radius is the loaded norm, so that the first retraction changes nothing."""
    flags = ["--no-load-optim", "--sso-radius-mode", "from_weights"]
    run = go_on(megatron, adamw, *flags, ranks=tp, tp=tp)
    for name, (_, radius) in run.merged("retracted").items():
        norm = torch.linalg.svdvals(run.merged("initial")[name].double())[0].item()
        assert radius == pytest.approx(norm, rel=1e-5), name  # power iteration in float32
    assert norms_over_radius(run) == pytest.approx((1.0, 1.0), rel=1e-5), "nothing is scaled"
    straight = go_on(megatron, adamw, optimizer="adam", ranks=tp, tp=tp)
    assert len(run.losses) == len(straight.losses) == 4, "iterations are kept"
    assert run.losses[0] == pytest.approx(straight.losses[0], rel=1e-5), "and weights"
    jumps = go_on(megatron, adamw, "--no-load-optim", ranks=tp, tp=tp)
    assert jumps.losses[0] == pytest.approx(run.losses[0], rel=1e-5)
    assert norms_over_radius(jumps)[1] > 1.5


def test_radii_stay_in_later_checkpoints(megatron, adamw) -> None:
    """Also of a run whose factor is another one."""
    flags = ["--sso-radius-mode", "from_weights"]
    first = go_on(megatron, adamw, "--no-load-optim", *flags, *stop_at(12))
    radii = {name: radius for name, (_, radius) in first.merged("retracted").items()}
    stored = contents(first.folder / "ckpt" / "iter_0000012")
    for name, radius in radii.items():
        assert stored[f"optimizer.spectral.{name}/shard_0_1"]["radius"].item() == radius
    for factor in (1.0, 1.5):
        argv = ["--sso-radius-scaler", factor, *flags]
        second = go_on(megatron, first, *argv, ranks=2, tp=2)
        for name, (_, radius) in second.merged("retracted").items():
            assert radius == pytest.approx(factor * radii[name], rel=1e-6), name


def test_sso_and_muon_sphere_load_each_other(megatron) -> None:
    first = megatron.run(tiny(*SHORT, *stop_at(10)))
    argv = tiny(*SHORT, "--load", first.folder / "ckpt", optimizer="muon_sphere")
    run = megatron.run(argv, calls=("probes.checkpoint_state:saved_again",))
    saved, found = contents(first.folder / "ckpt" / "iter_0000010"), contents(run.folder / "again")
    buffers = [key for key in saved if "momentum_buffer" in key]
    assert buffers
    for key in buffers:
        assert saved[key].any() and torch.equal(found[key], saved[key]), key
