"""Orthonormal bases of thin blocks from Gram matrices, on what breaks Gram matrices."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.megatron_runs import Megatron
from sso_megatron.cli.bench.meters import HostSyncs
from sso_megatron.linalg.orthonormal import orthonormalize


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def conditioned(p: int, k: int, condition: float) -> Tensor:
    left, right = (torch.linalg.qr(noise(2, size, k).double()).Q for size in (p, k))
    return ((left * torch.logspace(0, -np.log10(condition), k)) @ right).float()


SIZES = [(512, 8), (2048, 31), (40, 7), (7, 7), (5, 1)]


@pytest.mark.parametrize(("p", "k"), SIZES)
@pytest.mark.parametrize("kind", ["noise", "1e4", "1e8", "rising", "falling", "denormal", "huge"])
def test_a_basis_of_everything_that_is_there(p: int, k: int, kind: str) -> None:
    if kind.startswith("1e"):
        P = conditioned(p, k, float(kind))
    else:
        scales = {"rising": torch.logspace(-20, 20, k), "falling": torch.logspace(20, -20, k)}
        P = noise(2, p, k) * scales.get(kind, {"denormal": 1e-42, "huge": 1e37}.get(kind, 1.0))
    U = orthonormalize(P).double()
    torch.testing.assert_close(U.mT @ U, torch.eye(k).double().expand(2, k, k), rtol=0, atol=1e-6)
    columns = P.double() / torch.linalg.vector_norm(P.double(), dim=-2, keepdim=True)
    assert (columns - U @ (U.mT @ columns)).abs().max() < 1e-6


@pytest.mark.parametrize(("p", "k"), SIZES[:3])
def test_it_is_qr_with_a_positive_diagonal(p: int, k: int) -> None:
    """Column by column, by float64 Householder; so it does not matter that scales differ."""
    P = noise(p, k) * torch.logspace(0, 6, k)
    Q, R = np.linalg.qr(P.double().numpy())
    np.testing.assert_allclose(orthonormalize(P[None])[0].numpy(), Q * np.sign(np.diag(R)), atol=1e-6)


def test_what_is_not_there_stays_finite() -> None:
    """Zero blocks and columns come out zero, and columns that depend on others no longer than 1."""
    P = noise(6, 40, 5)
    P[0] = 0
    P[1, :, 3] = 0
    P[2, :, 3:] = 2 * P[2, :, :2]
    P[3] = noise(40, 2) @ noise(2, 5)
    P[4] = P[4, :, :1]
    P[5] = torch.nan
    U = orthonormalize(P)
    assert not U[0].any() and not U[1, :, 3].any()
    assert torch.isfinite(U[:5]).all(), "nor does the spoilt one spoil others"
    values = torch.linalg.svdvals(U[:5].double())
    assert values.max() < 1 + 1e-6
    for block, basis in zip(P[1:5].double(), U[1:5].double(), strict=True):
        assert torch.linalg.norm(block - basis @ (basis.mT @ block)) < 1e-5 * torch.linalg.norm(block)


def test_empty_blocks_and_float64() -> None:
    assert orthonormalize(torch.zeros(2, 4, 0)).shape == (2, 4, 0)
    assert orthonormalize(torch.zeros(0, 4, 2)).shape == (0, 4, 2)
    U = orthonormalize(noise(2, 60, 9).double())
    torch.testing.assert_close(U.mT @ U, torch.eye(9).double().expand(2, 9, 9), rtol=0, atol=1e-11)
    wide = orthonormalize(noise(1, 3, 5))  # more columns than rows: a basis, and nothing beyond it
    torch.testing.assert_close(wide[..., :3].mT @ wide[..., :3], torch.eye(3)[None], rtol=0, atol=1e-6)


def test_nothing_waits_for_the_device() -> None:
    with HostSyncs() as syncs:
        orthonormalize(noise(2, 60, 9))
    assert syncs.count == 0, syncs.sources


@pytest.mark.parametrize("lengths", [[20, 30], [3, 47], [17, 17, 16]])
def test_cut_rows(megatron: Megatron, lengths: list[int]) -> None:
    run = megatron.run([json.dumps(lengths)], len(lengths), main="tasks.thin:orthonormal")
    basis, whole = torch.cat(run.saved("basis"), dim=1), run.saved("whole")[0]
    torch.testing.assert_close(basis[0], whole[0], rtol=0, atol=1e-6)
    assert not basis[2].any()
    assert torch.isfinite(basis).all()
    others = [0, 1, 3, 4, 5]  # column 2 is twice column 1: the rest does not depend on what it became
    gram = basis[1][:, others].double().mT @ basis[1][:, others].double()
    torch.testing.assert_close(gram, torch.eye(5).double(), rtol=0, atol=1e-6)
