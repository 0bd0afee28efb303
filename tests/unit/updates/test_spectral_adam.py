"""SpectralAdam against its formulas in float64, torch's AdamW, and itself on cut matrices."""

import json

import numpy as np
import pytest
import torch

from helpers import oracle
from helpers.comparisons import worst_error
from helpers.megatron_runs import Megatron
from helpers.numerics.cuts import CUT, MATRICES, whole_and_cut
from helpers.numerics.problems import start
from helpers.numerics.step_costs import assert_waits_once, assert_workspace
from sso_megatron import SpectralAdam

NAME = "param_groups[0].params[0]"
SHAPES = [(48, 64), (32, 80), (80, 32), (48, 48)]


def gradients(shape: tuple[int, int], steps: int = 50) -> list[np.ndarray]:
    """A few strong directions and noise; norms jump up at 7 and 30, and down after each."""
    rng = np.random.default_rng(0)
    spike = rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1]))
    scales = [4.0 if number in (7, 30) else 1.0 for number in range(steps)]
    return [scale * (spike + rng.standard_normal(shape)) for scale in scales]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [{}, {"period": 7, "beta1": 0.8, "weight_decay": 0.0}])
def test_fifty_steps_follow_the_published_formulas(shape, settings) -> None:
    W, steps = start(shape, 0), gradients(shape)
    v = np.linalg.svd(steps[0])[2][0]
    param = torch.nn.Parameter(torch.from_numpy(W).float())
    optimizer = SpectralAdam([param], lr=3e-3, **settings)
    state = {"gradient_vector": torch.from_numpy(v)[:, None].float(), "gradient_norm": torch.tensor(0.0)}
    optimizer.load_spectral_state({NAME: state})
    names = {name: value for name, value in settings.items() if name != "weight_decay"}
    exact, divided = oracle.SpectralAdamOracle(W, v, **names), []
    for number, G in enumerate(steps, 1):
        param.grad = torch.from_numpy(G).float()
        optimizer.step()
        if exact.step(G, 3e-3, weight_decay=settings.get("weight_decay", 0.1)):
            divided.append(number)
        stats = optimizer.batches[0].stats
        assert bool(stats.divided) == (number in divided)
        sigma = np.linalg.norm(G, ord=2)
        assert 0.95 * sigma < stats.sigma.item() < sigma * (1 + 1e-6), "the start is a step old"
    regular = range(0, 51, 7)[1:] if settings else [50]
    assert divided == sorted({1, 8, 9, 31, 32, *regular})
    error = np.linalg.norm(param.detach().double().numpy() - exact.W) / np.linalg.norm(exact.W)
    assert error < 2 * 50 * torch.finfo(torch.float32).eps, "two roundings a step"


def test_without_divisions_it_is_adamw() -> None:
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(40, 60, generator=gen))]
    params.append(torch.nn.Parameter(params[0].detach().clone()))
    ours = SpectralAdam([params[0]], lr=1e-2, high_threshold=1e30, low_threshold=1e-30, period=1000)
    adamw = torch.optim.AdamW([params[1]], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(20):
        gradient = torch.randn(40, 60, generator=gen)
        for param in params:
            param.grad = gradient.clone()
        ours.step()
        adamw.step()
        assert not ours.batches[0].stats.divided
    # Either rounds the weights twice a step: at their decay and at the update.
    bound = 2 * 20 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(*params, rtol=bound, atol=bound)


def test_thresholds_are_ratios_of_norms() -> None:
    """The published 1.5 and 0.67, from either side."""
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(20, 30, generator=gen)) for _ in range(4)]
    gradients = [torch.randn(20, 30, generator=gen) for _ in params]
    optimizer = SpectralAdam(params)
    for ratios in ([1.0] * 4, [1.49, 1.51, 0.68, 0.66]):
        for param, gradient, ratio in zip(params, gradients, ratios, strict=True):
            param.grad = ratio * gradient
        optimizer.step()
    stats = optimizer.batches[0].stats
    assert stats.ratio.tolist() == pytest.approx([1.49, 1.51, 0.68, 0.66], rel=1e-6)
    assert stats.divided.tolist() == [False, True, False, True]


def test_divisions_are_one_by_one() -> None:
    """Of four equal matrices one jumps: it alone is divided."""
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(20, 30, generator=gen)) for _ in range(4)]
    optimizer = SpectralAdam(params)
    for number in range(6):
        for index, param in enumerate(params):
            scale = 3.0 if (number, index) == (3, 2) else 1.0
            param.grad = scale * torch.randn(20, 30, generator=gen)
        optimizer.step()
        wanted = {0: [True] * 4, 3: [False, False, True, False], 4: [False, False, True, False]}
        assert optimizer.batches[0].stats.divided.tolist() == wanted.get(number, [False] * 4)


def test_no_gradient_and_a_zero_gradient() -> None:
    """Without one nothing of a matrix changes; of zeros AdamW goes on, and the last norm stays."""
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(12, 20, generator=gen)) for _ in range(2)]
    optimizer = SpectralAdam(params, weight_decay=0.0)
    for missing in (torch.zeros(12, 20), None):
        for _ in range(2):
            for param in params:
                param.grad = torch.randn(12, 20, generator=gen)
            optimizer.step()
        kept = [v.clone() for v in (params[1], *optimizer.state[params[1]].values())]
        cache = optimizer.batches[0].cache
        norm, v = cache.norm[1].clone(), cache.v[1].clone()
        params[1].grad = missing
        optimizer.step()
        unchanged = [
            torch.equal(a, b)
            for a, b in zip(kept, (params[1], *optimizer.state[params[1]].values()), strict=True)
        ]
        assert all(unchanged) if missing is None else not any(unchanged)
        assert torch.equal(cache.norm[1], norm) and torch.equal(cache.v[1], v)
        assert torch.isfinite(params[1]).all()


def test_zeros_from_the_start() -> None:
    param = torch.nn.Parameter(torch.ones(5, 8))
    optimizer = SpectralAdam([param], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        param.grad = torch.zeros(5, 8)
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((5, 8), (1 - 0.1 * 0.5) ** 3))
    param.grad = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.isfinite(param).all() and optimizer.batches[0].stats.divided.all()


def test_a_norm_that_is_lost_is_no_jump() -> None:
    param = torch.nn.Parameter(torch.ones(5, 8))
    optimizer = SpectralAdam([param])
    for number in range(4):
        param.grad = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
        if number == 2:
            optimizer.reset_caches()
        optimizer.step()
        assert bool(optimizer.batches[0].stats.divided) == (number == 0)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (2, 30)])
def test_vectors_are_matrices_too(shape) -> None:
    param = torch.nn.Parameter(torch.zeros(shape))
    optimizer = SpectralAdam([param], lr=0.1)
    param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    torch.testing.assert_close(param.detach(), -0.1 * param.grad.sign(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(512, 512), (256, 1024)])
def test_workspace_is_what_a_step_takes(shape) -> None:
    assert_workspace(SpectralAdam, shape, 0.9)


def test_the_first_step_is_the_only_one_that_waits() -> None:
    assert_waits_once(SpectralAdam, [(96, 96), (96, 96), (128, 80), (40, 1)])


def test_settings_are_checked() -> None:
    for settings, message in (
        (
            {"low_threshold": 2.0},
            "low_threshold=2.0 must be less than high_threshold=1.5; the",
        ),
        ({"high_threshold": 0.0}, "high_threshold=0.0 must be positive and finite; the default is 1.5"),
        ({"period": 0}, "period=0 must be at least 1; the default is 50"),
        ({"period": 2.5}, "period=2.5 must be an integer; the default is 50"),
        ({"weight_decay": float("inf")}, "weight_decay=inf must be finite and not negative"),
        ({"beta1": 1.0}, r"beta1=1.0 must lie in \[0, 1\); the default is 0.9"),
        ({"eps": 0.0}, "eps=0.0 must be positive and finite; the default is 1e-08"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be finite and not negative; the default"),
    ):
        with pytest.raises(ValueError, match=message):
            SpectralAdam([torch.nn.Parameter(torch.randn(4, 4))], **settings)


# ---------------------------------------------------------------- cut matrices


def test_cut_matrices_follow_whole_ones(megatron: Megatron) -> None:
    whole, cut = whole_and_cut(megatron, "spectral_adam", steps=8)
    assert worst_error(cut, whole) < 1e-5
    assert worst_error(cut, whole, "kept") < 1e-5
    for collectives in cut.saved("collectives"):
        for name, (m, n, dim, _) in CUT.items():
            thin = [2 * m * 4, 2 * n * 4] if dim else [2 * 8, 2 * 8, 2 * n * 4]
            for step in collectives[name][1:]:
                assert step == [("all_reduce", size) for size in [2 * 8, *thin]]


def test_owners_are_refused(megatron: Megatron) -> None:
    task = {
        "matrices": MATRICES,
        "mode": "owner",
        "steps": 1,
        "gradients": "noise",
        "optimizer": "SpectralAdam",
    }
    run = megatron.run([json.dumps(task)], 2, main="tasks.parallel:train", fails=True)
    assert "tp_mode='owner' gives whole matrices to owners" in run.log
