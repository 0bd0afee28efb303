"""What the Newton-Schulz products in TF32 and bfloat16 cost in accuracy, and that nothing else is in them.

TF32 is emulated where torch is told to use it: factors of float32 products are rounded to ten binary
places. bfloat16 is as on a GPU: stored with seven places, summed in float32.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.numerics.rounding import EIGHT, MATMUL, MOST_LOST, SPECTRA, TensorCores, measure
from helpers.paths import SCRIPTS
from sso_megatron import SSO, MuonSphere
from sso_megatron.linalg.polar import msign
from sso_megatron.linalg.power_iteration import power_iteration
from sso_megatron.linalg.symmetric import Products, choose_kernel

PRODUCTS = {name: Products(name, "torch") for name in ("fp32", "tf32", "bf16")}


@pytest.fixture
def models_own_precision() -> Iterator[None]:
    """As a training script sets it for its model."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


# Error in the Frobenius norm, relative. bfloat16 itself keeps nothing of singular values far below the
# largest: rounding X fills their directions with noise, which costs next to nothing of the objective.
MOST_ERROR = {"fp32": 2e-4, "tf32": 1e-2, "bf16": 2e-2}
WELL_KNOWN = ("gaussian", "condition 1e1", "spike")


@pytest.mark.parametrize("shape", [(96, 96), (192, 96), (384, 96), (96, 384), (1536, 96)], ids=str)
@pytest.mark.parametrize("precision", PRODUCTS)
def test_accuracy(precision: str, shape: tuple[int, int]) -> None:
    for name, spectrum in SPECTRA.items():
        error, lost = measure(shape, spectrum, PRODUCTS[precision])
        print(f"{shape} {precision} {name}: error {error:.1e}, lost {lost:.1e}")
        assert lost <= MOST_LOST[precision], name
        if precision != "bf16" or name in WELL_KNOWN:
            # An eighth and a hundredth of the directions: the others are noise of float32 at first.
            factor = {"rank 1": 10, "rank 8": 5}.get(name, 1)
            assert error <= factor * MOST_ERROR[precision], name


@pytest.mark.parametrize("precision", PRODUCTS)
def test_residual_is_removed_from_what_came_out(precision: str) -> None:
    """``|<u v^T, Phi>| <= 1e-4`` on every step of a training, whatever the products of ``msign`` lost."""
    gen = torch.Generator().manual_seed(0)
    for shape in ((64, 64), (64, 256), (160, 64)):
        param = torch.nn.Parameter(torch.randn(shape, generator=gen))
        pull = torch.randn(shape, generator=gen)
        optimizer = SSO([param], lr=0.05, msign_precision=precision)
        for _ in range(8):
            param.grad = pull + torch.randn(shape, generator=gen)
            (batch,) = optimizer.batches
            before, basis = param.detach().clone(), batch.cache and batch.cache.basis.clone()
            with TensorCores():
                optimizer.step()
            if basis is None:
                continue
            radius = batch.cache.radius
            top = power_iteration(before[None], basis, degree=6)
            Phi = (before * (radius / batch.stats.sigma) - param.detach()) / (0.05 * radius)
            residual = (top.u[0] @ Phi @ top.v[0]).abs()
            print(f"{shape} {precision}: {batch.stats.residual.item():.1e}, then {residual:.1e}")
            assert residual <= 1e-4


@pytest.mark.parametrize("kind", [SSO, MuonSphere])
def test_nothing_else_is_in_reduced_precision(kind: Any, models_own_precision: None) -> None:
    """Eight steps of three products each for a square matrix; the model's own setting does not count."""

    def step(**settings: Any) -> tuple[Tensor, TensorCores]:
        param = torch.nn.Parameter(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))
        optimizer = kind([param], lr=0.1, **settings)
        for number in range(3):
            param.grad = torch.randn(40, 40, generator=torch.Generator().manual_seed(number))
            with TensorCores() as cores:
                optimizer.step()
        list(optimizer.retracted())
        return param.detach(), cores

    before = (MATMUL.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
    assert before[0] == "tf32"
    weight, cores = step()
    assert cores.num_tf32 == 0 < cores.num_float32
    _, cores = step(msign_precision="tf32")
    assert cores.num_tf32 == 24 < cores.num_float32
    assert (MATMUL.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) == before
    torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(step()[0], weight, rtol=0, atol=0)


def test_float64_stays_float64() -> None:
    X = torch.randn(1, 24, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for products in PRODUCTS.values():
        torch.testing.assert_close(msign(X, EIGHT, products), msign(X, EIGHT), rtol=0, atol=0)


def chosen(
    *shape: int, square: bool = True, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> list[str]:
    """With each kernel wanted; the same for a matrix that lies transposed."""
    A = torch.empty(shape, device=device, dtype=dtype)
    both = [
        [choose_kernel(name, X, is_square=square) for name in ("triton", "quack", "torch")]
        for X in (A, A.mT.contiguous().mT)
    ]
    assert both[0] == both[1]
    return both[0]


def test_choice_of_kernels() -> None:
    """By device, dtype, shape and layout alone."""
    with FakeTensorMode():
        assert chosen(4, 2048, 4096) == ["triton", "quack", "torch"]
        assert chosen(4, 1024, 4096) == ["torch", "quack", "torch"]
        assert chosen(4, 128, 4096) == ["torch"] * 3
        assert chosen(4, 2048, 2048, square=False) == ["torch", "quack", "torch"]
        assert chosen(4, 2048, 4095) == chosen(4, 2044, 4096) == ["torch"] * 3
        assert chosen(4, 2048, 4096, dtype=torch.float32) == ["torch"] * 3
        assert chosen(4, 2048, 4096, device="cpu") == ["torch"] * 3
        strided = torch.empty(4, 2048, 4096, 2, device="cuda", dtype=torch.bfloat16)[..., 0]
        assert choose_kernel("quack", strided, is_square=True) == "torch"


@pytest.mark.slow
def test_triton_kernel_in_its_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    script = SCRIPTS / "interpreted_syrk.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    errors = [float(line) for line in run.stdout.splitlines()]
    assert len(errors) == 12
    assert max(errors) < 2**-8


def test_a_kernel_that_is_not_there_is_named() -> None:
    param = torch.nn.Parameter(torch.randn(8, 8))
    with pytest.raises(ValueError, match="symmetric_kernel='quack' needs msign_precision='bf16'; "):
        SSO([param], symmetric_kernel="quack")
    if importlib.util.find_spec("quack") is None:
        with pytest.raises(ImportError, match=r"'quack' cannot be .*pip install quack-kernels"):
            SSO([param], msign_precision="bf16", symmetric_kernel="quack")
