"""The line of SSO's search, whole and cut, against float64 SVD; and the Gram form it rests on."""

import numpy as np
import pytest
import torch

from helpers import oracle
from helpers.numerics.spectra import EIGHT, with_spectrum
from sso_megatron.linalg.polar import gram_polynomial, gram_polynomial_times
from sso_megatron.linalg.polar_line import CutLine, PolarLine, WholeLine
from sso_megatron.linalg.power_iteration import TopSingular, power_iteration, start_basis

SHAPES = [(48, 24), (24, 48), (32, 32)]


def line_between(X: torch.Tensor, top: TopSingular, is_cut: bool) -> PolarLine:
    """The line, whole or as if all rows were of one rank."""
    if not is_cut:
        return WholeLine(X.clone(), top, EIGHT)
    M = X.double()
    return CutLine(M, M.mT @ M, top, EIGHT, lambda part: part)


def line_of(M: np.ndarray, W: np.ndarray, is_cut: bool) -> tuple:
    """The line, and ``M`` and ``Theta`` as it sees them: rounded to float32."""
    sigma, *vectors = oracle.top_triplet(W)
    X, u, v = (torch.from_numpy(a).float()[None] for a in (M / np.linalg.norm(M), *vectors))
    top = TopSingular(torch.tensor([sigma]), u, v, torch.zeros(1, 1, 1))
    Theta = np.outer(u[0].double().numpy(), v[0].double().numpy())
    return line_between(X, top, is_cut), X[0].double().numpy(), Theta


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", [10.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut"])
def test_line_follows_the_oracle(shape, condition, is_cut) -> None:
    """``h`` and ``msign`` by all ways, also where the Gram matrix of the long side has no full rank."""
    values = np.geomspace(1, 1 / condition, min(shape))
    M, W = with_spectrum(*shape, values), with_spectrum(*shape, values, seed=1)
    for lam in (0.0, 0.05, -0.3):
        line, M, Theta = line_of(M, W, is_cut)
        at = torch.tensor([lam])
        wanted = oracle.newton_schulz_factor(M + lam * Theta, EIGHT)
        h, extra = line.evaluate(at)
        accepted, measured = line.accept(at, extra), line.measure_fully(at)
        factor = line.factor(at)
        for value in (h, measured, (factor.w * factor.v).sum(dim=-1)):
            assert value.item() == pytest.approx(np.sum(Theta * wanted), abs=2e-4)
        for Phi in (accepted, factor.matrix()):
            error = np.linalg.norm(Phi[0].double().numpy() - wanted) / np.linalg.norm(wanted)
            # Float32 of whole matrices; the cut form works in float64.
            assert error < (1e-5 if is_cut else 2e-4)


@pytest.mark.parametrize("shape", [*SHAPES, (96, 24)])
@pytest.mark.parametrize("condition", [10.0, 1e3])
@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut"])
def test_rough_measure(shape, condition, is_cut) -> None:
    """Five steps of the table leave singular values within 13 % of 1."""
    values = np.geomspace(1, 1 / condition, min(shape))
    M, W = with_spectrum(*shape, values), with_spectrum(*shape, values, seed=1)
    line, M, Theta = line_of(M, W, is_cut)
    for lam in (0.0, 0.05, -0.3):
        wanted = np.sum(Theta * oracle.newton_schulz_factor(M + lam * Theta, EIGHT))
        assert line.measure(torch.tensor([lam])).item() == pytest.approx(wanted, abs=0.13)


@pytest.mark.parametrize("distance", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut"])
def test_a_momentum_that_the_line_cancels(distance, is_cut) -> None:
    """M is almost -Theta, and lam takes it away: what is left is all there is."""
    W, noise = with_spectrum(48, 24, np.geomspace(1, 0.1, 24)), with_spectrum(48, 24, np.ones(24), seed=1)
    _, u, v = oracle.top_triplet(W)
    M = -np.outer(u, v) + distance * noise / np.linalg.norm(noise)
    line, M, Theta = line_of(M, W, is_cut)
    lam = torch.tensor([-np.sum(Theta * M) / np.sum(Theta**2)]).float()
    wanted = oracle.newton_schulz_factor(M + lam.double().item() * Theta, EIGHT)
    Phi = line.factor(lam).matrix()
    error = np.linalg.norm(Phi[0].double().numpy() - wanted) / np.linalg.norm(wanted)
    # Rounding of M to float32, 6e-8 of it, is so much of what is left.
    assert error < 1e-6 / distance


def test_trials_of_some_members() -> None:
    M = np.stack([with_spectrum(20, 12, np.geomspace(1, 0.1, 12), seed) for seed in range(3)])
    X = torch.from_numpy(M / np.linalg.norm(M, axis=(1, 2), keepdims=True)).float()
    W = torch.from_numpy(M[::-1].copy()).float()
    top = power_iteration(W, start_basis(W, 12), degree=6)
    rows, lam = torch.tensor([2, 0]), torch.tensor([0.1, 0.2])
    for is_cut in (False, True):
        line = line_between(X, top, is_cut)
        everything = line.evaluate(torch.tensor([0.2, 0.0, 0.1]))
        for found, wanted in zip(line.evaluate(lam, rows), everything, strict=True):
            torch.testing.assert_close(found, wanted[rows])


@pytest.mark.parametrize("num_steps", [1, 5, 8])
def test_gram_polynomial_is_the_iteration(num_steps: int) -> None:
    X = with_spectrum(40, 24, np.geomspace(1, 1e-4, 24))
    X /= np.linalg.norm(X)
    table = EIGHT[:num_steps]
    Q = gram_polynomial(torch.from_numpy(X.T @ X)[None], table)[0].numpy()
    np.testing.assert_allclose(Q, Q.T, atol=1e-9 * np.abs(Q).max())
    wanted = oracle.newton_schulz_factor(X, table)
    assert np.linalg.norm(X @ Q - wanted) < 1e-6 * np.linalg.norm(wanted)
    x = torch.randn(1, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = gram_polynomial_times(torch.from_numpy(X.T @ X)[None], x, table)[0].numpy()
    np.testing.assert_allclose(found, Q @ x[0].numpy(), atol=1e-9 * np.abs(Q).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_power_iteration_on_cut_rows(shape: tuple[int, int]) -> None:
    """Rows of two ranks, summed by hand: the triplet of the whole matrix, u in two parts."""
    W = torch.from_numpy(with_spectrum(*shape, 0.9 ** np.arange(min(shape)))).float()[None]
    whole = power_iteration(W, start_basis(W, 16), degree=6, num_passes=8)
    parts = (W[:, :10], W[:, 10:])
    basis = start_basis(W, 16, rows_are_cut=True)
    found = [
        power_iteration(
            part,
            basis,
            degree=6,
            num_passes=8,
            all_reduce=lambda here, other=other: here + other.mT @ other,
        )
        for part, other in (parts, parts[::-1])
    ]
    for part in found:
        torch.testing.assert_close(part.sigma, whole.sigma, rtol=1e-6, atol=0)
        torch.testing.assert_close(part.v.abs(), whole.v.abs(), rtol=1e-4, atol=1e-5)
    u = torch.cat([part.u for part in found], dim=-1)
    torch.testing.assert_close(u.abs(), whole.u.abs(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.vector_norm(u, dim=-1), torch.ones(1))
