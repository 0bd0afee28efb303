"""Stable rank of rows that come by and by, and nuclear norm, against exact singular values."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import polar_coefficients
from sso_megatron.linalg.norms.nuclear_norm import norms
from sso_megatron.linalg.norms.stable_rank import StreamedRows, add_rows, squared_norms
from sso_megatron.linalg.shard_view import ShardView
from sso_megatron.mcore.metrics.input_stable_rank import _normed

N = 128


def exact(A: Tensor) -> float:
    s = torch.linalg.svdvals(A.double())
    return (s.square().sum() / s[0] ** 2).item()


def measured(parts: list[Tensor]) -> float:
    rows = StreamedRows(torch.zeros((), dtype=torch.float64))
    for part in parts:
        add_rows(rows, part, ShardView((0, part.size(1))))
    assert rows.block is not None
    return (rows.square / squared_norms(rows.block[None])[0]).item()


def spectra() -> dict[str, Tensor]:
    j = torch.arange(1.0, N + 1)
    return {
        "1/j": 1 / j,
        "j^-1/2": j**-0.5,
        "exponential": torch.exp(-j / 25),
        "one ahead": torch.cat([torch.tensor([8.0]), torch.ones(N - 1)]),
        "rank one": (j == 1).float(),
    }


@pytest.mark.parametrize("num_parts", [1, 2, 16])
@pytest.mark.parametrize("spectrum", spectra())
def test_rows_in_parts(spectrum: str, num_parts: int) -> None:
    gen = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(N, N, generator=gen)).Q
    A = (torch.randn(1024, N, generator=gen) * spectra()[spectrum]) @ basis.mT
    assert measured(list(A.chunk(num_parts))) == pytest.approx(exact(A), rel=2e-3)


def test_parts_with_directions_of_their_own() -> None:
    """Forty, more than a block has columns: the limit that the documentation names."""
    gen = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(N, N, generator=gen)).Q
    parts = [
        torch.randn(64, N, generator=gen) + 20 * torch.randn(64, 1, generator=gen) * basis[:, i]
        for i in range(40)
    ]
    assert 1 <= measured(parts) / exact(torch.cat(parts)) <= 1.07, "the norm is never too large"


@pytest.mark.parametrize("num_rows", [1, 3, 33])
def test_few_rows(num_rows: int) -> None:
    A = torch.randn(num_rows, N, generator=torch.Generator().manual_seed(0))
    for parts in ([A], list(A.split(1)), [A, A[:0], torch.zeros(5, N)], [A, A, A]):
        assert measured(parts) == pytest.approx(exact(A), rel=1e-4)


def test_narrow_half_precision_and_odd_scales() -> None:
    A = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1e-15, 1e15):
        assert measured([scale * A[:90], scale * A[90:]]) == pytest.approx(exact(A), rel=1e-5)
    assert measured([A.bfloat16()]) == pytest.approx(exact(A.bfloat16()), rel=1e-5)


@pytest.mark.parametrize("shape", [(96, 96), (96, 300), (300, 96)])
@pytest.mark.parametrize("is_cut", [False, True])
def test_nuclear_norm(shape: tuple[int, int], is_cut: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    j = torch.arange(1.0, 97)
    U, V = (torch.linalg.qr(torch.randn(size, 96, generator=gen)).Q for size in shape)
    for s in (1 / j, j**-2, torch.ones(96), (j == 1).float(), torch.where(j == 1, 1.0, 1e-4)):
        for scale in (1.0, 1e-15, 1e15):
            G = scale * ((U * s) @ V.mT)[None]
            wanted = torch.linalg.svdvals(G.double())[0]
            # On one rank that has all rows, whose sum is what it holds.
            all_reduce = (lambda part: part) if is_cut else None
            nuclear, frobenius = norms(G, polar_coefficients("polar_express", 10), all_reduce)
            assert nuclear.item() == pytest.approx(wanted.sum().item(), rel=2e-3)
            assert frobenius.item() == pytest.approx(wanted.square().sum().sqrt().item(), rel=1e-5)


def test_layers_that_norm_their_input_themselves() -> None:
    """By TransformerEngine's names of what such a layer has."""
    x = torch.randn(4, 2, N)
    norm = torch.nn.LayerNorm(N, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    module = SimpleNamespace(
        layer_norm_weight=norm.weight,
        layer_norm_bias=norm.bias,
        eps=1e-3,
        normalization="LayerNorm",
        zero_centered_gamma=False,
    )
    torch.testing.assert_close(_normed(module, x), norm(x))
    module.zero_centered_gamma, module.normalization = True, "RMSNorm"
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + norm.weight)
    torch.testing.assert_close(_normed(module, x), wanted)
    assert _normed(torch.nn.Linear(N, N), x) is x
