"""Soft spectral clipping against exact singular values in float64."""

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from helpers import oracle
from helpers.megatron_runs import Megatron
from sso_megatron.linalg.coefficients import polar_coefficients
from sso_megatron.linalg.spectral_clip import spectral_clip

EIGHT = polar_coefficients("polar_express", 8)
SHAPES = [(64, 64), (48, 200), (200, 48), (1, 1), (1, 30), (30, 1)]


def spectrum(kind: str, size: int) -> np.ndarray:
    """Singular values, Frobenius norm 1."""
    values = np.ones(size)
    if kind == "decay":
        values = np.logspace(0, -5, size)
    elif kind == "spike":
        values[1:] = 1e-3
    elif kind == "spikes":
        values[8:] = 1e-2
    elif kind == "cliff":
        values[size // 2 + 1 :] = 1e-4
    return values / np.linalg.norm(values)


KINDS = ["flat", "decay", "spike", "spikes", "cliff"]


def matrix(shape: tuple[int, int], kind: str, norm: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix of Frobenius norm ``norm``, rounded to float32, with its exact singular vectors."""
    rng, size = np.random.default_rng(0), min(shape)
    U, V = (np.linalg.qr(rng.standard_normal((side, size)))[0] for side in shape)
    X = ((U * (norm * spectrum(kind, size))) @ V.T).astype(np.float32).astype(np.float64)
    U, _, Vt = np.linalg.svd(X, full_matrices=False)
    return X, U, Vt


def clip(X: np.ndarray, c: float, dtype: torch.dtype = torch.float32, **settings: Any) -> np.ndarray:
    coefficients = settings.pop("coefficients", EIGHT)
    return (
        spectral_clip(torch.from_numpy(X).to(dtype)[None], c, coefficients, **settings)[0].double().numpy()
    )


def top(X: np.ndarray) -> float:
    return float(np.linalg.norm(X, 2))


def ours(part: torch.Tensor) -> torch.Tensor:
    """A sum over one rank."""
    return part


@pytest.mark.parametrize("all_reduce", [None, ours], ids=["whole", "cut"])
@pytest.mark.parametrize("ratio", [0.1, 1, 100, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_singular_value_is_clipped_softly(shape, kind, ratio, all_reduce) -> None:
    c = 10.0
    X, U, Vt = matrix(shape, kind, ratio * c)
    H, exact = clip(X, c, all_reduce=all_reduce), oracle.clipped(X, c)
    assert top(H) <= c
    assert top(H - exact) <= 2e-4 * min(c, top(X))
    # In the direction of each singular value that float32 can hold.
    gains = np.diag(U.T @ H @ Vt.T) / np.diag(U.T @ exact @ Vt.T)
    values = np.diag(U.T @ X @ Vt.T)
    assert np.abs(gains[values > 1e-4 * values[0]] - 1).max() <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_small_values_keep_their_gain_under_large_updates(kind: str) -> None:
    """Frobenius norm 1e3 at c = 10, where the published form halves them if one value has it all."""
    X, U, Vt = matrix((64, 96), kind, 1e3)
    exact = np.diag(U.T @ oracle.clipped(X, 10.0) @ Vt.T)
    gains = np.diag(U.T @ clip(X, 10.0) @ Vt.T) / exact
    assert np.abs(gains - 1).max() <= 1e-3
    published = np.diag(U.T @ oracle.clipped_as_published(X, 10.0) @ Vt.T) / exact
    if kind == "spike":
        assert published.min() == pytest.approx(0.53, abs=0.01)
    assert np.abs(oracle.clipped_as_published(X, 1e3) - oracle.clipped(X, 1e3)).max() < 1e-6 * 1e3


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_for_the_largest_updates(kind: str) -> None:
    """1e4 times c; with the steps for it the small singular values are right, too."""
    X, _, _ = matrix((96, 128), kind, 1e5)
    assert top(clip(X, 10.0)) <= 10.0
    twelve = clip(X, 10.0, coefficients=polar_coefficients("polar_express", 12))
    assert top(twelve) <= 10.0
    assert top(twelve - oracle.clipped(X, 10.0)) <= 2e-3


def test_steps_are_as_far_reaching_as_documented() -> None:
    """The table on the singular values themselves: 1e-3 off at most from 1/2400, or 1/1300 with seven."""

    def worst(num_steps: int, reach: float) -> tuple[float, float]:
        values = np.logspace(-math.log10(reach), 0, 20001)
        for a, b, c in polar_coefficients("polar_express", num_steps):
            values = a * values + b * values**3 + c * values**5
        return 1 - float(values.min()), float(values.max()) - 1

    for num_steps, reach in ((7, 1300), (8, 2400), (9, 4400), (12, 29000)):
        below, above = worst(num_steps, reach)
        assert below < 1.1e-3 and above < 1e-6
    assert worst(6, 1000)[1] > 1e-3, "why there are never fewer than seven"


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_exact(shape: tuple[int, int]) -> None:
    X, _, _ = matrix(shape, "spike", 1e3)
    np.testing.assert_allclose(clip(X, 10.0, torch.float64), oracle.clipped(X, 10.0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_limits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    X, _, _ = matrix(shape, "decay", 1e3)
    assert np.abs(clip(X, 1e9, dtype) - X).max() <= 1e-5 * top(X), "nothing to clip"
    assert not clip(np.zeros(shape), 10.0, dtype).any()
    # Scale: H_{tc}(tX) = t H_c(X), over all that float32 has but its last few binary orders.
    for scale in (1e-30, 1e25):
        np.testing.assert_allclose(
            clip(scale * X, scale * 10, dtype) / scale, clip(X, 10.0, dtype), atol=1e-3
        )


def test_a_threshold_for_each_matrix_and_one_on_the_device() -> None:
    X = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    thresholds = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    each = spectral_clip(X, thresholds, EIGHT)
    for matrix, c, result in zip(X, thresholds, each, strict=True):
        torch.testing.assert_close(result, spectral_clip(matrix[None], c, EIGHT)[0])
        torch.testing.assert_close(result, spectral_clip(matrix[None], float(c), EIGHT)[0])
    assert spectral_clip(X[:0], 1.0, EIGHT).shape == (0, 20, 30)


@pytest.mark.parametrize(("m", "n"), [(60, 24), (24, 60), (40, 40)])
def test_rows_on_three_ranks_need_one_sum(m: int, n: int) -> None:
    X = 5 * torch.randn(2, m, n, generator=torch.Generator().manual_seed(0))
    bounds = [0, m // 2, m // 2, m]
    parts = [X[:, start:stop] for start, stop in pairwise(bounds)]
    gram = sum(part.double().mT @ part.double() / (4 * (1 - 256 * 2**-23)) ** 2 for part in parts)
    calls = []

    def all_reduce(part: torch.Tensor) -> torch.Tensor:
        calls.append(part.shape)
        return gram.clone()

    results = [spectral_clip(part, 4.0, EIGHT, all_reduce) for part in parts]
    assert calls == [(2, n, n)] * 3
    torch.testing.assert_close(
        torch.cat(results, dim=1), spectral_clip(X, 4.0, EIGHT), rtol=1e-4, atol=1e-5
    )


MATRICES = {
    "rows": [24, 36, 0, None],
    "tall": [48, 18, 0, None],
    "columns": [18, 36, 1, None],
    "uneven": [20, 16, 0, [13, 7]],
    "whole": [10, 14, None, None],
}


@pytest.mark.parametrize("base", ["adamw", "signum", "ademamix"])
@pytest.mark.parametrize("mode", ["duplicated", "owner", "distributed"])
def test_cut_matrices_follow_whole_ones(megatron: Megatron, mode: str, base: str) -> None:
    """Two ranks and one, over Gloo: weights, and gradients clipped before."""
    settings = {"base": base, "c": 3.0, "train_steps": 6, "c_warmup_steps": 2, "pre_clip_c": 0.5}
    task = {"matrices": MATRICES, "mode": mode, "steps": 6, "gradients": "decaying", "settings": settings}
    task |= {"lrs": [0.02, 0.05], "optimizer": "SpectralClip"}
    main = "tasks.parallel:train"
    one, two = (megatron.run([json.dumps(task)], ranks, main=main) for ranks in (1, 2))
    final, wanted = two.merged("final"), one.merged("final")
    assert final.keys() == wanted.keys()
    for name, weight in wanted.items():
        error = torch.linalg.norm(final[name] - weight) / torch.linalg.norm(weight)
        # A float32 sign flips where two ranks' gradients differ in the last bit.
        assert error < (1e-5 if base != "signum" else 1e-3), name
    expected = {name: mode for name in MATRICES} | {"whole": "local"}
    if mode == "distributed":  # where the longer side is cut
        expected |= {"rows": "owner"}
    for modes in two.saved("modes"):
        assert {name: modes[name] for name in MATRICES} == expected


def test_cut_matrices_need_one_sum_a_step(megatron: Megatron) -> None:
    matrices = {f"layer {i}": [36, 24, 0, None] for i in range(4)}
    task = {"matrices": matrices, "mode": "distributed", "steps": 3, "gradients": "noise"}
    task["optimizer"] = "SpectralClip"
    run = megatron.run([json.dumps(task)], 2, main="tasks.parallel:train")
    for steps in run.saved("collectives"):
        assert steps == [[("all_reduce", 4 * 24 * 24 * 8)]] * 3
