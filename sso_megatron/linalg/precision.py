"""Sets the precision of products of float32 matrices, whatever the model's own products are set to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Compute products of float32 matrices in ``precision`` within the block; also a decorator.

    ``torch.set_float32_matmul_precision`` and similar settings are global, and meant for the model.

    Args:
        precision: ``ieee`` for float32 as it is; ``tf32`` for tensor cores, which round the factors to ten
            binary places, where the device has them.
    """
    matmuls: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [_own_setting(matmul) for matmul in matmuls]
    for matmul, wanted in zip(matmuls, (precision, "ieee"), strict=True):
        matmul.fp32_precision = wanted
    try:
        yield
    finally:
        for matmul, setting in zip(matmuls, before, strict=True):
            matmul.fp32_precision = setting


def _own_setting(matmul: Any) -> str:
    """Return a backend's own setting, ``none`` where it follows ``torch.backends.fp32_precision``."""
    seen = matmul.fp32_precision
    matmul.fp32_precision = "none"
    followed: str = matmul.fp32_precision
    return "none" if seen == followed else seen
