"""SSO and MuonSphere against Algorithm 1 by float64 SVD."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch

from helpers import oracle
from helpers.numerics.problems import low_rank_problem, noise_problem, start
from sso_megatron import SSO
from sso_megatron.linalg.coefficients import polar_coefficients

MODES = [
    {"solver": "tracking"},
    {"solver": "bisection"},
    {"tangent": "project"},
    {"tangent": "none"},
    {"solver": "bisection", "nesterov": False, "radius_mode": "identity", "radius_scaler": 2.0},
]


def fifty_steps(problem, shape, settings, factor=oracle.polar_factor) -> float:
    """Relative error of the weight after 50 steps; checks the tangent residual of every step."""
    lr = 5e-3
    gradient = problem(shape, 0)
    exact = start(shape, 0)
    buffer = np.zeros(shape)
    param = torch.nn.Parameter(torch.from_numpy(exact).float())
    optimizer = SSO([param], lr=lr, **settings)
    config = optimizer.config
    spectral = config.radius_scaler * math.sqrt(shape[0] / shape[1])
    radius = spectral if config.radius_mode == "spectral_mup" else config.radius_scaler
    for _ in range(50):
        G = gradient(exact)
        param.grad = torch.from_numpy(G).float()
        before = param.detach().double().numpy()
        optimizer.step()
        exact, buffer = oracle.sso_step(
            exact,
            buffer,
            G,
            lr=lr,
            nesterov=config.nesterov,
            radius=radius,
            scale=radius,
            tangent=config.tangent,
            factor=factor,
        )
        if config.tangent != "none":
            # The step that was taken, against the exact top pair of the weight it was taken from.
            # Its own estimate of sigma undoes the retraction: an error of 1e-6 there is not Phi's.
            _, u, v = oracle.top_triplet(before)
            sigma = optimizer.batches[0].stats.sigma.item()
            Phi = (before * (radius / sigma) - param.detach().double().numpy()) / (lr * radius)
            assert abs(u @ Phi @ v) <= 2e-4
    return float(np.linalg.norm(param.detach().double().numpy() - exact) / np.linalg.norm(exact))


@pytest.mark.slow
@pytest.mark.parametrize("problem", [noise_problem, low_rank_problem])
@pytest.mark.parametrize("shape", [(48, 64), (32, 80), (80, 32)])
@pytest.mark.parametrize("settings", MODES, ids=lambda s: "-".join(map(str, s.values())))
def test_fifty_steps_follow_algorithm_1(problem, shape, settings) -> None:
    assert fifty_steps(problem, shape, settings) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("problem", [noise_problem, low_rank_problem])
@pytest.mark.parametrize("settings", MODES, ids=lambda s: "-".join(map(str, s.values())))
def test_fifty_steps_of_square_matrices(problem, settings) -> None:
    """Square momenta have singular values that eight Newton-Schulz steps do not bring to 1.

    Down to 1e-5 of the norm here, while the published table reaches to 1e-3; so the reference
    applies the same polynomial, exactly, instead of the polar factor.
    """
    coefficients = polar_coefficients("polar_express", 8)
    factor = partial(oracle.newton_schulz_factor, coefficients=coefficients)
    assert fifty_steps(problem, (48, 48), settings, factor) < 2e-3


@pytest.mark.parametrize("solver", ["tracking", "bisection"])
def test_residual_is_removed_exactly(solver: str) -> None:
    """<Theta, Phi> of the update itself, from the optimizer's own Theta, without lr in the way."""
    from sso_megatron.updates import sso as update

    rule = SSO([torch.nn.Parameter(torch.ones(2, 2))], solver=solver)._rule
    gen = torch.Generator().manual_seed(0)
    W = torch.randn(4, 40, 64, generator=gen) * 0.1
    cache = update.start_cache(W, rule)
    cache.radius.fill_(0.8)
    for _ in range(50):
        N = torch.randn(4, 40, 64, generator=gen)
        before = W.clone()
        copy = dataclasses.replace(cache)
        top = update.retract_to_spectral_sphere_(before, copy, lr=1.0, rule=rule)
        W2 = W.clone()
        update.sso_step_(W2, N, cache, scale=1.0, lr=1.0, rule=rule)
        Phi = before - W2
        residual = torch.einsum("bm,bmn,bn->b", top.u, Phi, top.v)
        assert residual.abs().max() <= 2e-6
        W = before - 0.01 * Phi


@pytest.mark.parametrize("solver", ["tracking", "bisection"])
def test_the_step_is_the_steepest_tangent_one(solver: str) -> None:
    """Objective <Mhat, Phi> no worse than projecting, and within 1e-3 of the exact solution."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((40, 60)) * 0.05
    sigma, u, v = oracle.top_triplet(W)
    G = 0.2 * np.outer(u, v) + 0.02 * rng.standard_normal((40, 60))
    M = G / np.linalg.norm(G)

    def objective(**settings: object) -> float:
        param = torch.nn.Parameter(torch.from_numpy(W).float())
        optimizer = SSO([param], lr=1.0, momentum=0.0, radius_mode="identity", **settings)
        param.grad = torch.from_numpy(G).float()
        optimizer.step()
        return float(np.sum(M * (W / sigma - param.detach().double().numpy())))

    Theta = np.outer(u, v)
    lam = oracle.tangent_root(M, Theta)
    exact = float(np.sum(M * oracle.polar_factor(M + lam * Theta)))
    assert abs(objective(solver=solver) - exact) < 1e-3 * exact
    assert exact > 0 and abs(lam) > 0.05, "a problem where the search matters"


def test_a_root_out_of_reach_is_not_converged() -> None:
    """A gradient turns from along a weight's top direction to against it, six matrices to six degrees.

    The reported residual is that of the direction at the reported lambda, and 0.3 is near enough.
    """
    rng = np.random.default_rng(0)
    strengths = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.5])
    weights, noise = rng.standard_normal((6, 40, 60)) * 0.05, rng.standard_normal((40, 60)) * 0.02
    pulls = [np.outer(*oracle.top_triplet(W)[1:]) for W in weights]
    params = [torch.nn.Parameter(torch.from_numpy(W).float()) for W in weights]
    optimizer = SSO(params, lr=1e-3, momentum=0.0, radius_mode="identity")
    coefficients = polar_coefficients("polar_express", 8)
    steps = []
    for sign in (1, 1, -1, -1, -1):
        before = [param.detach().double().numpy() for param in params]
        gradients = [
            noise + sign * strength * pull for strength, pull in zip(strengths, pulls, strict=True)
        ]
        for param, G in zip(params, gradients, strict=True):
            param.grad = torch.from_numpy(G).float()
        optimizer.step()
        (batch,) = optimizer.batches
        residuals = []
        for W, G, lam in zip(before, gradients, batch.stats.lam.tolist(), strict=True):
            _, u, v = oracle.top_triplet(W)
            Z = G / np.linalg.norm(G) + lam * np.outer(u, v)
            residuals.append(u @ oracle.newton_schulz_factor(Z, coefficients) @ v)
        np.testing.assert_allclose(batch.stats.residual.numpy(), residuals, atol=1e-4)
        assert batch.stats.converged.tolist() == [abs(h) <= 0.3 for h in residuals]
        steps.append(residuals)
    turned = np.abs(steps[2])
    assert (turned > 0.3).any() and (turned <= 0.3).any(), "a problem of both kinds"
    assert np.abs(steps[-1]).max() <= 0.3, "found again after three steps"
