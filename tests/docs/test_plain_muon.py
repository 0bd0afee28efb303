"""The example of docs/development.md, "Muon in 40 lines": by value in torch, and in real Megatron runs."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from helpers import oracle
from helpers.comparisons import assert_equal
from helpers.megatron_runs import Megatron, Run, assert_same_run, tiny
from helpers.probes.plain_muon import run_block
from helpers.runs.plans import assert_same_loads, read
from sso_megatron import SpectralConfig
from sso_megatron.linalg.coefficients import polar_coefficients
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS

EIGHT = polar_coefficients("polar_express", 8)
# Rounding of the smallest singular values is stretched by the slope of the polynomials at 0, and by a small
# factor for the products that it goes through.
STRETCHED = 4 * torch.finfo(torch.float32).eps * math.prod(a for a, _, _ in EIGHT)
ONE = ("--train-iters", 1, "--lr-decay-style", "constant", "--lr-warmup-iters", 0)
LONG = ("--ffn-hidden-size", 4096)
FLAGS = ("--lr", 5e-3, "--plain-muon-momentum", 0.8, "--plain-muon-weight-decay", 0.1)


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The block's names; the table of optimizers is put back afterwards."""
    monkeypatch.setitem(OPTIMIZERS, "plain_muon", None)
    return run_block()


@pytest.fixture(scope="module")
def train(megatron: Megatron) -> Callable[..., Run]:
    """A function that trains a tiny model with plain Muon on some ranks, once for the same flags."""

    @functools.cache
    def run(tp: int, *flags: object, dp: int = 1, register: str = "register") -> Run:
        calls = (f"probes.plain_muon:{register}", "probes:weights", "probes.checkpoint_state:state")
        return megatron.train(tiny(*FLAGS, *flags, tp=tp, optimizer="plain_muon"), tp * dp, calls)

    return run


def scale(shape: tuple[int, ...]) -> float:
    return max(1.0, shape[0] / shape[1]) ** 0.5


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (96, 24), (40, 40)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_an_exact_svd(block: dict[str, Any], shape: Any, nesterov: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, generator=gen))
    settings = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.2}
    optimizer = block["PlainMuon"]([param], 0.05, **settings)
    W, M = param.detach().double().numpy().copy(), np.zeros(shape)
    for _ in range(3):
        param.grad = torch.randn(shape, generator=gen)
        G = param.grad.double().numpy()
        M = 0.9 * M + 0.1 * G
        N = 0.1 * G + 0.9 * M if nesterov else M
        step = 0.05 * scale(shape) * oracle.newton_schulz_factor(N, EIGHT)
        W = (1 - 0.05 * 0.2) * W - step
        optimizer.step()
        error = np.linalg.norm(param.detach().double().numpy() - W) / np.linalg.norm(step)
        assert error < STRETCHED
        W = param.detach().double().numpy().copy()


@pytest.mark.parametrize("mode", ["auto", "distributed", "owner"])
def test_a_step_in_megatron_is_that_of_an_exact_svd(train: Callable[..., Run], mode: str) -> None:
    """The first step goes along the momentum, which the run saves as it saves the weights around it."""
    run = train(2, "--spectral-tp-mode", mode, *ONE)
    before, after, momentum = (run.merged(name) for name in ("initial", "final", "momentum"))
    assert len(before) == 2 * (4 + 2 + 2 + 1 + 2 + 1), "heads, output, gate and up, down of two layers"
    for name, W in before.items():
        factor = oracle.newton_schulz_factor(momentum[name].double().numpy(), EIGHT)
        step = 5e-3 * scale(factor.shape) * factor
        wanted = (1 - 5e-3 * 0.1) * W.double().numpy() - step
        assert np.linalg.norm(after[name].double().numpy() - wanted) < STRETCHED * np.linalg.norm(step), (
            name
        )
    modes = set().union(*run.saved("modes"))
    assert mode == "auto" or mode in modes


def test_its_flag_reaches_the_step(train: Callable[..., Run]) -> None:
    """A first momentum is (1 - beta) times the gradient, which does not depend on beta."""
    some, more = (train(1, *ONE, "--plain-muon-momentum", beta) for beta in (0.5, 0.75))
    halves = more.merged("momentum")
    assert halves
    for name, momentum in some.merged("momentum").items():
        torch.testing.assert_close(momentum, 2 * halves[name], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["auto", "distributed", "owner", "duplicated"])
def test_two_ranks_train_as_one(train: Callable[..., Run], mode: str) -> None:
    assert_same_run(train(2, "--spectral-tp-mode", mode), train(1))


def test_sharded_ranks_train_as_one(train: Callable[..., Run]) -> None:
    """Each data-parallel rank steps on its share of the matrices; measuring them changes nothing."""
    sharded = train(1, "--use-distributed-optimizer", "--log-spectral-metrics", 1, dp=2)
    assert_same_run(sharded, train(1))


@pytest.mark.parametrize("register", ["register", "register_without_decay"])
def test_a_plan_is_what_the_run_does(megatron: Megatron, register: str) -> None:
    """Flops and bytes, which follow from the base class's defaults alone."""
    flags = ["--train-iters", 2, "--lr-warmup-iters", 0, "--weight-decay", 0.1]
    own = FLAGS if register == "register" else []
    argv = tiny(*own, *flags, tp=2, optimizer="plain_muon")
    calls = (f"probes.plain_muon:{register}",)
    planned = megatron.run(
        ["--world-size", "2", "--json", "plan.json", *argv], calls=calls, main="probes.plan:plan"
    )
    real = megatron.run(argv, 2, (*calls, "probes.plan:watch"))
    assert_same_loads(read(planned), real)


def test_an_algorithm_for_whole_matrices_never_gets_a_shard(train: Callable[..., Run]) -> None:
    """Where bytes cost nothing and matrices are 64 to 1, ``auto`` leaves shards of those that may stay."""
    cheap = ("--spectral-flops-per-byte", 1e-9, *LONG)
    assert "distributed" in set().union(*train(2, *cheap).saved("modes"))
    whole = train(2, *cheap, register="register_for_whole_matrices")
    assert_same_run(whole, train(1, *LONG))
    assert "distributed" not in set().union(*whole.saved("modes"))


def test_shards_are_refused_at_once(block: dict[str, Any], megatron: Megatron) -> None:
    kind = type("WholeMuon", (block["PlainMuon"],), {"works_on_shards": False})
    params = [torch.nn.Parameter(torch.ones(4, 4))]
    with pytest.raises(ValueError, match="'distributed' leaves shards on their ranks, and WholeMuon needs"):
        kind(params, 0.1, shared=SpectralConfig(tp_mode="distributed"))
    argv = tiny("--spectral-tp-mode", "distributed", optimizer="plain_muon")
    run = megatron.run(argv, 1, ("probes.plain_muon:register_for_whole_matrices",), fails=True)
    assert run.codes != [0]
    wanted = (
        "--spectral-tp-mode distributed with --optimizer plain_muon: its step takes whole matrices; use"
    )
    assert wanted in run.log


def test_a_resumed_run_is_an_uninterrupted_one(train: Callable[..., Run]) -> None:
    straight = train(2, "--train-iters", 8, "--save", "ckpt", "--save-interval", 4)
    second = train(2, "--train-iters", 8, "--load", straight.folder / "ckpt", "--ckpt-step", 4)
    assert second.losses == straight.losses[4:] and len(second.losses) == 4
    for name in ("state", "final", "momentum"):
        for found, wanted in zip(second.saved(name), straight.saved(name), strict=True):
            assert_equal(found, wanted)
