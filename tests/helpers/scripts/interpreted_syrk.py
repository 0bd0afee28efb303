"""Triton's symmetric kernel run by Triton's interpreter; prints errors relative to float64.

Run in a process of its own: the interpreter is chosen when Triton is imported, and emerging-optimizers
tunes its kernel, which needs a device, unless ``absl.testing`` is there.
"""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import absl.testing  # noqa: F401
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from sso_megatron.linalg.symmetric import product_by

dot = interpreter.InterpreterBuilder.create_dot


def widened_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter multiplies the bits of bfloat16 as integers; these are the numbers."""
    wide = [
        interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        for x in (a, b)
    ]
    return dot(self, *wide, *rest)


interpreter.InterpreterBuilder.create_dot = widened_dot

gen = torch.Generator().manual_seed(0)
for shape in ((2, 96, 160), (1, 160, 96), (2, 200, 64)):
    X = torch.randn(shape, generator=gen).bfloat16()
    for Y in (X, X.mT.contiguous().mT):
        R = product_by("triton", Y.mT, Y)
        exact = Y.double().mT @ Y.double()
        print(((R.double() - exact).norm() / exact.norm()).item())
        R /= 100
        Z = product_by("triton", R, R, R, alpha=2.5, beta=-3.0)
        exact = 2.5 * R.double() @ R.double() - 3.0 * R.double()
        print(((Z.double() - exact).norm() / exact.norm()).item())
