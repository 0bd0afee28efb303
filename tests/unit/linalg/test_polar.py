"""msign against the polar factor by float64 SVD."""

import numpy as np
import pytest
import torch

from helpers import oracle
from helpers.numerics.spectra import EIGHT, with_spectrum
from sso_megatron.linalg.coefficients import coefficient_types, polar_coefficients
from sso_megatron.linalg.polar import frobenius_norm, msign


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (4, 2000), (2000, 4), (1, 64), (64, 1)])
@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_polar_factor(shape: tuple[int, int], condition: float) -> None:
    values = np.geomspace(1, 1 / condition, min(shape))
    X = with_spectrum(*shape, values)
    found = msign(torch.from_numpy(X).float()[None], EIGHT)[0].double().numpy()
    # The table maps [1e-3, 1] into 1 +- 1e-4; beyond that float32 adds its rounding.
    assert np.abs(found - oracle.polar_factor(X)).max() < 3e-4


def test_each_matrix_of_a_batch_for_itself() -> None:
    batch = torch.randn(5, 24, 40, generator=torch.Generator().manual_seed(0))
    batch[3] *= 1e4
    alone = torch.cat([msign(X[None], EIGHT) for X in batch])
    torch.testing.assert_close(msign(batch, EIGHT), alone, rtol=1e-5, atol=1e-6)


def test_ill_conditioned_values_follow_the_polynomial() -> None:
    """Below the table's bound of 1e-3 values stay small: exactly the scalar recurrence, in float64."""
    values = np.geomspace(1, 1e-8, 24)
    X = with_spectrum(24, 36, values)
    expected = values / np.linalg.norm(values)
    for a, b, c in EIGHT:
        expected = a * expected + b * expected**3 + c * expected**5
    found = np.linalg.svd(msign(torch.from_numpy(X)[None], EIGHT)[0].numpy(), compute_uv=False)
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-9, atol=1e-12)
    assert expected.max() < 1.001


def test_rank_one_and_zero() -> None:
    u, v = np.random.default_rng(0).standard_normal((2, 30))
    X = torch.from_numpy(np.outer(u, v)).float()
    expected = np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))
    both = msign(torch.stack([X, torch.zeros_like(X)]), EIGHT)
    np.testing.assert_allclose(both[0].numpy(), expected, atol=2e-4)
    assert torch.count_nonzero(both[1]) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    X = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(msign(X * scale, EIGHT), msign(X, EIGHT), rtol=1e-4, atol=1e-5)
    norms = torch.linalg.matrix_norm((X * scale).double())
    torch.testing.assert_close(frobenius_norm(X * scale), norms, rtol=1e-6, atol=0)


def test_half_precision_is_worked_on_in_single() -> None:
    X = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(msign(X, EIGHT), msign(X.float(), EIGHT), rtol=0, atol=0)


def test_polar_express_table() -> None:
    """The specification's rows, to the digits that the authors published."""
    assert EIGHT[0] == (8.2051, -22.9019, 16.4607)
    assert EIGHT[6] == (1.8564, -1.2132, 0.3568)
    assert EIGHT[7] == (1.8750, -1.2500, 0.3750)
    assert polar_coefficients("polar_express", 10)[8:] == (EIGHT[7], EIGHT[7])
    assert len(set(polar_coefficients("quintic", 6))) == 5, "quintic starts again after five rows"
    assert {"polar_express", "quintic", "simple"} <= set(coefficient_types())


def test_unknown_table_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'cubic' is unknown; choose one of .*polar_express"):
        polar_coefficients("cubic", 8)
    with pytest.raises(ValueError, match="msign_steps=0 must be at least 1"):
        polar_coefficients("polar_express", 0)
