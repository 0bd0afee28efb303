"""An optimizer whose step is recorded once and replayed, as a CUDA graph would."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sso_megatron import SSO, MuonSphere
from sso_megatron.matrices.layout import ParameterLayout, gate_up_splits, section_splits, whole

# Fused parameters: gate and up, and three matrices under each other of which two are equal.
SHAPES = {"mlp": (96, 40), "qkv": (80, 40), "wide": (24, 72), "square": (40, 40), "small": (40, 1)}
SPLITS = {
    "mlp": gate_up_splits((96, 40), None, 1),
    "qkv": section_splits((80, 40), [("q", 32), ("k", 32), ("v", 16)], None, 1),
}
SETTINGS = [
    pytest.param(SSO, {}, id="sso"),
    pytest.param(SSO, {"solver_trials": 4, "weight_decay": 0.1, "nesterov": False}, id="four trials"),
    pytest.param(SSO, {"tangent": "project", "scale_mode": "align_adam_rms"}, id="project"),
    pytest.param(SSO, {"retract_mode": "dynamic", "radius_mode": "from_weights"}, id="dynamic"),
    pytest.param(SSO, {"msign_precision": "bf16"}, id="bf16"),
    pytest.param(MuonSphere, {}, id="muon_sphere"),
    pytest.param(MuonSphere, {"weight_decay": 0.1, "retract_mode": "dynamic"}, id="muon_sphere dynamic"),
]


class Training:
    """An optimizer whose parameters, gradients and learning rate stay where they are."""

    def __init__(self, kind: Any, split: bool, device: str, dtype: torch.dtype, **settings: Any) -> None:
        self.gen = torch.Generator(device).manual_seed(0)
        self.params = {}
        layouts = {}
        for name, shape in SHAPES.items():
            weight = torch.randn(shape, device=device, generator=self.gen)
            self.params[name] = param = torch.nn.Parameter(weight.to(dtype))
            param.grad = torch.zeros_like(param)
            splits = SPLITS.get(name) if split else None
            layouts[param] = ParameterLayout(name, splits or (whole(shape),))
        self.lr = torch.tensor(0.02, device=device)
        self.optimizer = kind(list(layouts), self.lr, find_layout=layouts.__getitem__, **settings)

    def prepare(self, step: int) -> None:
        """Gradients and learning rate of a step."""
        for param in self.params.values():
            assert param.grad is not None
            param.grad.copy_(torch.randn(param.shape, device=param.device, generator=self.gen))
        self.lr.fill_(0.02 / (1 + step))

    def everything(self) -> dict[str, Tensor]:
        """All that a step changes."""
        found = {name: param.detach().clone() for name, param in self.params.items()}
        for name, param in self.params.items():
            found |= {f"{key} of {name}": v.clone() for key, v in self.optimizer.state[param].items()}
        for name, state in self.optimizer.spectral_state().items():
            found |= {f"{key} of {name}": value for key, value in state.items()}
        for number, batch in enumerate(self.optimizer.batches):
            seen = vars(batch.stats) if batch.stats else {}
            found |= {
                f"{key} seen in batch {number}": v.clone() for key, v in seen.items() if v is not None
            }
        return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
