"""Top singular triplets against float64 SVD, spectra of SSO-trained weights among them."""

import numpy as np
import pytest
import torch

from helpers.numerics.spectra import with_spectrum
from sso_megatron.linalg.power_iteration import power_iteration, start_basis

COLD = {"degree": 6, "num_passes": 8}


def relative_error(W: torch.Tensor, sigma: torch.Tensor) -> float:
    exact = torch.linalg.svdvals(W.double())[..., 0]
    return ((sigma.double() - exact).abs() / exact).max().item()


def rounding(W: torch.Tensor) -> float:
    """Of sums of as many float32 products as the longer side has: like a random walk's, by the root."""
    return max(W.shape[-2:]) ** 0.5 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (3, 1000), (1000, 3), (1, 64), (64, 1)])
def test_triplet(shape: tuple[int, int]) -> None:
    k = min(shape)
    W = torch.from_numpy(with_spectrum(*shape, 0.8 ** np.arange(k))).float()[None]
    top = power_iteration(W, start_basis(W, 16), **COLD)
    assert relative_error(W, top.sigma) < 1e-6
    U, _, Vt = np.linalg.svd(W[0].double().numpy(), full_matrices=False)
    Theta = np.outer(top.u[0].double().numpy(), top.v[0].double().numpy())
    assert np.abs(Theta - np.outer(U[:, 0], Vt[0])).max() < 1e-5
    # W v = sigma u holds whatever the gap.
    np.testing.assert_allclose((W[0] @ top.v[0]).numpy(), (top.sigma * top.u[0]).numpy(), atol=1e-5)


@pytest.mark.parametrize("shape", [(128, 128), (64, 256), (384, 128)])
def test_random_matrices_from_a_cold_start(shape: tuple[int, int]) -> None:
    """No gap below the top: 12 random matrices at once."""
    W = torch.randn(12, *shape, generator=torch.Generator().manual_seed(1))
    assert relative_error(W, power_iteration(W, start_basis(W, 16), **COLD).sigma) < rounding(W)


def test_many_values_at_the_top() -> None:
    """What SSO makes of weights: 20 singular values within half a per cent of the largest."""
    values = np.concatenate([np.linspace(1, 0.995, 20), np.linspace(0.98, 0.1, 108)])
    W = torch.from_numpy(with_spectrum(128, 192, values)).float()[None]
    assert relative_error(W, power_iteration(W, start_basis(W, 16), **COLD).sigma) < 1e-4


def test_all_values_equal() -> None:
    W = torch.from_numpy(with_spectrum(32, 48, np.full(32, 0.7))).float()[None]
    top = power_iteration(W, start_basis(W, 8), **COLD)
    assert relative_error(W, top.sigma) < rounding(W)
    assert torch.isfinite(top.u).all() and torch.isfinite(top.v).all()


def test_far_apart_values_do_not_overflow() -> None:
    values = np.geomspace(1e12, 1e-12, 40)
    W = torch.from_numpy(with_spectrum(40, 60, values)).float()[None]
    assert relative_error(W, power_iteration(W, start_basis(W, 8), **COLD).sigma) < rounding(W)


def test_rank_one_and_zero() -> None:
    u, v = np.random.default_rng(0).standard_normal((2, 30))
    W = torch.from_numpy(np.stack([np.outer(u, v), np.zeros((30, 30))])).float()
    top = power_iteration(W, start_basis(W, 8), **COLD)
    assert relative_error(W[:1], top.sigma[:1]) < 1e-6
    assert top.sigma[1] == 0
    assert all(torch.isfinite(t).all() for t in top)


def test_a_warm_block_follows_a_moving_matrix_in_one_pass() -> None:
    """A drift of 5 % of the norm a step, faster than training's, cluster at the top, one pass a step.

    One pass from the block of the beginning, which does not follow, is not enough.
    """
    rng = torch.Generator().manual_seed(3)
    values = np.concatenate([np.linspace(1, 0.99, 12), np.linspace(0.97, 0.2, 84)])
    W = torch.from_numpy(with_spectrum(96, 160, values)).float()[None]
    basis = first = power_iteration(W, start_basis(W, 16), **COLD).basis
    worst = stale = 0.0
    for _ in range(50):
        step = torch.randn(1, 96, 160, generator=rng)
        W = W + 0.05 * step / torch.linalg.matrix_norm(step, ord=2)
        top = power_iteration(W, basis, degree=6)
        basis = top.basis
        worst = max(worst, relative_error(W, top.sigma))
        stale = max(stale, relative_error(W, power_iteration(W, first, degree=6).sigma))
    assert worst < rounding(W) < stale


def test_basis_is_orthonormal_and_the_same_for_everyone() -> None:
    W = torch.zeros(3, 20, 50)
    basis = start_basis(W, 16)
    assert basis.shape == (3, 20, 16)
    torch.testing.assert_close(basis[0].T @ basis[0], torch.eye(16), atol=1e-6, rtol=0)
    torch.manual_seed(77)
    assert torch.equal(basis, start_basis(W, 16)), "the training's random state must not matter"
    assert start_basis(torch.zeros(1, 5, 50), 16).shape == (1, 5, 5)
