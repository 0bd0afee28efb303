"""Matrix products in reduced precision, emulated, and what they cost ``msign``."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import oracle
from helpers.numerics.spectra import EIGHT, with_spectrum
from sso_megatron.linalg.polar import msign
from sso_megatron.linalg.symmetric import Products

MATMUL = torch.backends.cuda.matmul


def to_tf32(X: Tensor) -> Tensor:
    """Rounded to ten binary places, to the nearest and to even."""
    bits = X.contiguous().view(torch.int32)
    return (bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF).view(torch.float32)


class TensorCores(TorchDispatchMode):
    """Products of float32 as a device with tensor cores makes them; counts those in TF32 and all."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tf32 = self.num_float32 = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::bmm", "aten::baddbmm", "aten::baddbmm_"):
            *plus, A, B = args
            if A.dtype == torch.float32:
                assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
                self.num_float32 += 1
                if MATMUL.fp32_precision == "tf32":
                    self.num_tf32 += 1
                    args = (*plus, to_tf32(A), to_tf32(B))
        return func(*args, **(kwargs or {}))


SIDE = 96
SPECTRA = {
    "gaussian": None,
    "condition 1e1": np.geomspace(1, 1e-1, SIDE),
    "condition 1e3": np.geomspace(1, 1e-3, SIDE),
    "condition 1e5": np.geomspace(1, 1e-5, SIDE),
    "spike": np.array([1, *[1e-2] * (SIDE - 1)]),
    "spike and tail": np.array([1, *np.geomspace(3e-2, 1e-4, SIDE - 1)]),
    "rank 1": np.array([1, *[0] * (SIDE - 1)]),
    "rank 8": np.array([*[1] * 8, *[1e-4] * (SIDE - 8)]),
    "gap": np.array([*[1] * (SIDE // 2), *[3e-3] * (SIDE // 2)]),
    "decay": 1 / np.arange(1, SIDE + 1) ** 2,
}


# The most of <X, Phi> / ||Phi|| that may be lost beside the same polynomial on exact singular values.
MOST_LOST = {"fp32": 4e-5, "tf32": 2e-3, "bf16": 1e-2}


def measure(
    shape: tuple[int, int], spectrum: Any, products: Products, device: str = "cpu"
) -> tuple[float, float]:
    """Error and loss of ``msign``."""
    if spectrum is None:
        X = np.random.default_rng(0).standard_normal(shape)
    else:
        X = with_spectrum(*shape, spectrum)
    exact = oracle.newton_schulz_factor(X, EIGHT)
    with TensorCores():
        Phi = msign(torch.from_numpy(X)[None].float().to(device), EIGHT, products)[0].double().cpu().numpy()
    assert np.isfinite(Phi).all()
    error = np.linalg.norm(Phi - exact) / np.linalg.norm(exact)
    gain, wanted = (np.sum(X * Y) / np.linalg.norm(Y, 2) for Y in (Phi, exact))
    return float(error), float(1 - gain / wanted)
