"""Symmetric kernels and reduced precision on a real device, by value."""

import pytest
import torch
from torch import Tensor

from helpers.numerics.rounding import MOST_LOST, SPECTRA, measure
from sso_megatron.linalg.coefficients import polar_coefficients
from sso_megatron.linalg.polar import msign
from sso_megatron.linalg.symmetric import Products, choose_kernel, load_kernel, product_by

pytestmark = pytest.mark.gpu
KERNELS = ["triton", "quack"]


def need(kernel: str) -> None:
    """Skip where the kernel's package is not installed."""
    try:
        load_kernel(kernel)
    except ImportError as error:
        pytest.skip(str(error))


def error(found: Tensor, exact: Tensor) -> float:
    return (torch.linalg.norm(found.double() - exact) / torch.linalg.norm(exact)).item()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(3, 512, 256), (2, 2048, 2048), (1, 6144, 2048)], ids=str)
@pytest.mark.parametrize("lies", ["as it is", "transposed"])
def test_products(kernel: str, shape: tuple[int, int, int], lies: str) -> None:
    need(kernel)
    X = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
    X = X.mT.contiguous().mT if lies == "transposed" else X
    R = product_by(kernel, X.mT, X)
    assert error(R, X.double().mT @ X.double()) < 4e-3
    R = R / torch.linalg.matrix_norm(R.float())[:, None, None].to(R.dtype)
    Z = product_by(kernel, R, R, R, alpha=2.5, beta=-3.0)
    assert error(Z, 2.5 * R.double() @ R.double() - 3.0 * R.double()) < 4e-3


def test_quack_multiplies_what_commutes() -> None:
    need("quack")
    X = torch.randn(2, 512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    R = (X @ X.mT / 1e6).bfloat16()
    Z = (-3.0 * R.double() + 2.5 * R.double() @ R.double()).bfloat16()
    exact = 1.5 * R.double() + R.double() @ Z.double()
    assert error(product_by("quack", R, Z, R, beta=1.5), exact) < 8e-3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(2, 2048, 2048), (1, 4096, 2048), (1, 2048, 8192)], ids=str)
def test_msign_by_a_kernel(kernel: str, shape: tuple[int, int, int]) -> None:
    need(kernel)
    X = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    tall = X if shape[1] >= shape[2] else X.mT
    assert choose_kernel(kernel, tall.mT.bfloat16(), is_square=True) == kernel
    eight = polar_coefficients("polar_express", 8)
    exact = msign(X.double(), eight)
    found, plain = (msign(X, eight, Products("bf16", name)) for name in (kernel, "torch"))
    assert error(found, exact) < max(2e-2, 2 * error(plain, exact))


@pytest.mark.parametrize("shape", [(96, 96), (384, 96), (96, 384)], ids=str)
@pytest.mark.parametrize("precision", MOST_LOST)
def test_accuracy_on_the_device(precision: str, shape: tuple[int, int]) -> None:
    """The bounds that the emulation of tensor cores on the CPU keeps."""
    for name, spectrum in SPECTRA.items():
        _, lost = measure(shape, spectrum, Products(precision, "torch"), "cuda")
        assert lost <= MOST_LOST[precision], name
