"""Computes products whose result is symmetric, in a chosen precision and by a chosen kernel.

A kernel that knows the result to be symmetric computes half of it. Such kernels are for bfloat16 on CUDA
and large matrices; torch computes everything else.
"""

import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sso_megatron.linalg.precision import float32_products

# The packages that contain a kernel, and from how many columns of the product it is used. Triton's takes
# one matrix at a time and pays where its tiles fill the device; QuACK's takes a batch, and 256 is the bound
# from which gram-newton-schulz uses it. Not measured here.
_KERNELS = {"triton": ("emerging-optimizers triton", 2048), "quack": ("quack-kernels", 256)}


@functools.cache
def load_kernel(name: str) -> Any:
    """Return the module with the kernel ``triton`` or ``quack``.

    Raises:
        ImportError: the kernel is not installed, or not for this machine.
    """
    try:
        if name == "triton":
            from emerging_optimizers import triton_kernels as kernels
        else:
            from quack import gemm_interface as kernels
    except ImportError as error:
        raise ImportError(
            f"symmetric_kernel={name!r} cannot be imported ({error}); pip install {_KERNELS[name][0]}, or "
            "leave the setting at 'torch'"
        ) from error
    return kernels


def choose_kernel(wanted: str, A: Tensor, *, is_square: bool) -> str:
    """Return the kernel for a symmetric product of ``A``.

    It is ``wanted`` where that kernel can compute the product and is meant to be faster, else ``torch``.

    Args:
        wanted: ``torch``, ``triton`` or ``quack``.
        A: ``(b, n, k)``, the left factor.
        is_square: whether the product is ``A A^T``; Triton's kernel computes no other.
    """
    if wanted == "torch" or A.device.type != "cuda" or A.dtype != torch.bfloat16:
        return "torch"
    is_known = is_square or wanted == "quack"
    in_one_piece = A.is_contiguous() or A.mT.is_contiguous()
    # The device copies tiles from addresses that are multiples of 16 bytes.
    is_aligned = A.size(-2) % 8 == 0 and A.size(-1) % 8 == 0
    is_large = A.size(-2) >= _KERNELS[wanted][1]
    return wanted if is_known and in_one_piece and is_aligned and is_large else "torch"


def product_by(
    name: str, A: Tensor, B: Tensor, plus: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """Return ``A B``, or ``beta plus + alpha A B``, symmetric ``(b, n, n)``, from the named kernel."""
    if name == "torch":
        return A @ B if plus is None else torch.baddbmm(plus, A, B, alpha=alpha, beta=beta)
    kernel = load_kernel(name)
    if name == "quack":
        product: Tensor = kernel.gemm_symmetric(A, B, C=plus, alpha=float(alpha), beta=float(beta))
        return product
    rest = [None] * len(A) if plus is None else plus
    return torch.stack([kernel.tsyrk_ex(a, c, alpha, beta) for a, c in zip(A, rest, strict=True)])


@dataclass(frozen=True)
class Products:
    """Says how the products of a Newton-Schulz iteration on float32 matrices are computed.

    Attributes:
        precision: ``fp32``; ``tf32``, factors rounded to ten binary places; or ``bf16``, all matrices
            stored with seven. Sums are in float32.
        kernel: kernel of symmetric products in ``bf16``: ``torch``, ``triton`` or ``quack``.
    """

    precision: str
    kernel: str

    def for_dtype(self, dtype: torch.dtype) -> "Products":
        """Return these settings for float32, and ``PLAIN`` for other dtypes: float64 stays what it is."""
        return self if dtype == torch.float32 else PLAIN

    def setting(self) -> AbstractContextManager[None]:
        """Return the context in which the products are computed."""
        return float32_products("tf32" if self.precision == "tf32" else "ieee")

    def operand(self, X: Tensor) -> Tensor:
        """Return ``X`` in the dtype of the iteration."""
        return X.bfloat16() if self.precision == "bf16" else X

    def gram(self, X: Tensor) -> Tensor:
        """Return ``X^T X`` of ``(b, m, n)``."""
        return product_by(choose_kernel(self.kernel, X.mT, is_square=True), X.mT, X)

    def symmetric(self, A: Tensor, B: Tensor, plus: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
        """Return ``beta plus + alpha A B`` of symmetric ``(b, n, n)``, of which ``A`` and ``B`` commute."""
        name = choose_kernel(self.kernel, A, is_square=A is B)
        return product_by(name, A, B, plus if beta else None, alpha=alpha, beta=beta)


PLAIN = Products("fp32", "torch")
