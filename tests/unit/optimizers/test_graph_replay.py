"""A warm step replayed on the tensors that it was recorded on equals an eager one to the last bit.

What a CUDA graph does, without one: a tape keeps every operator of a step with its very arguments and
results, and runs them again. ``gpu/test_cuda_graph.py`` does the same with a real graph.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.numerics.recorded_steps import SETTINGS, Training, assert_same
from sso_megatron import SSO, MuonSphere, Spectra, SpectralAdam, SpectralClip
from sso_megatron.updates.sso import SpectralCache, sso_step_

# What a graph cannot hold: the host reads a value, and goes on from what it was at the recording.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

FAMILY = [
    pytest.param(Spectra, {}, id="spectra"),
    pytest.param(Spectra, {"momentum_dtype": "bf16", "nesterov": True}, id="spectra bf16"),
    pytest.param(SpectralAdam, {"period": 3}, id="spectral_adam"),
    pytest.param(SpectralClip, {"c": 2.0, "c_warmup_steps": 4}, id="clipped adamw"),
    pytest.param(SpectralClip, {"base": "signum"}, id="clipped signum"),
    pytest.param(SpectralClip, {"base": "ademamix", "train_steps": 4}, id="clipped ademamix"),
]


class Tape(TorchDispatchMode):
    """Records operators as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.removeprefix("aten::") not in READS, f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run them again; what is not made in place goes where it went at the recording."""
        for func, args, kwargs, recorded in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.float64), (True, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("kind", "settings"), SETTINGS + FAMILY)
def test_replayed_steps_equal_eager_ones(
    kind: Any, settings: dict[str, Any], split: bool, dtype: torch.dtype
) -> None:
    replayed, eager = (Training(kind, split, "cpu", dtype, **settings) for _ in range(2))
    for step in range(2):
        for training in (replayed, eager):
            training.prepare(step)
            training.optimizer.step()
    tape = Tape()
    for step in range(2, 6):
        replayed.prepare(step)
        if step == 2:
            with tape:
                replayed.optimizer.step()
        else:
            tape.replay()
        eager.prepare(step)
        eager.optimizer.step()
        assert_same(replayed.everything(), eager.everything())


def test_the_tape_does_not_hold_a_read() -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="waits for the device"), Tape():
        x.sum().item()


@pytest.mark.parametrize("kind", [SSO, MuonSphere])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "retract_mode": "dynamic"}], ids=str)
def test_learning_rate_as_a_tensor_or_a_number(kind: Any, settings: dict[str, Any]) -> None:
    tensor, number = (Training(kind, True, "cpu", torch.float32, **settings) for _ in range(2))
    for step in range(4):
        tensor.prepare(step)
        number.prepare(step)
        number.optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        tensor.optimizer.step()
        number.optimizer.step()
    for name, param in tensor.params.items():
        torch.testing.assert_close(param, number.params[name], rtol=1e-5, atol=1e-6)


class Devices(TorchDispatchMode):
    """Operators that touch a tensor of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if any(x.device.type == "cpu" for x in tensors):
            self.on_host.add(str(func))
        return result


@pytest.mark.parametrize("shape", [(40, 40), (128, 40), (40, 72)], ids=str)
@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_nothing_of_a_step_is_on_the_host(
    kind: Any, settings: dict[str, Any], shape: tuple[int, int]
) -> None:
    """On CUDA tensors without memory: a graph would read what the host held at capture."""
    rule = kind([torch.nn.Parameter(torch.ones(4, 4))], **settings)._rule
    with FakeTensorMode(), torch.no_grad():
        W, N = (torch.randn(3, *shape, device="cuda") for _ in range(2))
        basis = torch.randn(3, 40, 16, device="cuda")
        lam, slope, h, radius = (torch.ones(3, device="cuda") for _ in range(4))
        lr = torch.ones((), device="cuda")
        cache = SpectralCache(basis, lam, slope, h, radius, is_cold=False)
        with Devices() as devices:
            sso_step_(W, N, cache, scale=radius, lr=lr, rule=rule)
            assert devices.on_host == set()
            lam.cpu()
        assert devices.on_host, "and the test sees what is"
