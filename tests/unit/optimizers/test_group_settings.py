"""Settings of a parameter group: each is as if the group had an optimizer of its own."""

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch

from helpers.paths import ROOT
from sso_megatron import SSO, MuonSphere, Spectra, SpectralAdam, SpectralClip
from sso_megatron.optimizers.settings import group_settings

OTHER: dict[Any, dict[str, Any]] = {
    SSO: {
        "momentum": 0.5,
        "nesterov": False,
        "radius_scaler": 2.0,
        "scale_mode": "align_adam_rms",
        "weight_decay": 0.3,
    },
    Spectra: {"momentum": 0.5, "nesterov": True, "update_rms": 0.4, "eps": 0.1, "weight_decay": 0.3},
    SpectralAdam: {
        "high_threshold": 1.01,
        "low_threshold": 0.99,
        "period": 2,
        "beta1": 0.5,
        "beta2": 0.5,
        "eps": 0.1,
        "weight_decay": 0.3,
    },
    SpectralClip: {
        "c": 0.5,
        "beta1": 0.5,
        "beta2": 0.5,
        "eps": 0.1,
        "momentum": 0.5,
        "nesterov": False,
        "weight_decay": 0.3,
    },
}
OTHER[MuonSphere] = OTHER[SSO]
CASES = [(kind, name) for kind, others in OTHER.items() for name in others]


def base_of(kind: Any, name: str) -> dict[str, Any]:
    """Settings with which a change of the setting shows."""
    if kind is SpectralClip:
        return {"base": "signum"} if name in ("momentum", "nesterov") else {"c": 1.0}
    dynamic = {"retract_mode": "dynamic"} if kind in (SSO, MuonSphere) and name == "weight_decay" else {}
    return dynamic


def train(params: list[torch.nn.Parameter], optimizers: list[Any], steps: range) -> None:
    for step in steps:
        gen = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=gen) * (1 + 0.2 * (step % 2))
        for optimizer in optimizers:
            optimizer.step()


def weights() -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(9)
    return [torch.nn.Parameter(torch.randn(12, 8, generator=gen) / 4) for _ in range(2)]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_by_value(kind: Any, name: str) -> None:
    """Two groups of one shape against two optimizers; and it is not what one setting for both gives."""
    value, base = OTHER[kind][name], base_of(kind, name)
    together, apart, alike = weights(), weights(), weights()
    whole = kind([{"params": [together[0]], name: value}, {"params": [together[1]]}], lr=0.05, **base)
    train(together, [whole], range(4))
    whole.load_state_dict(copy.deepcopy(whole.state_dict()))  # which has no settings
    train(together, [whole], range(4, 6))
    own = kind([apart[0]], lr=0.05, **base | {name: value})
    train(apart, [own, kind([apart[1]], lr=0.05, **base)], range(6))
    for found, wanted in zip(together, apart, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    train(alike, [kind(alike, lr=0.05, **base)], range(6))
    assert not torch.allclose(alike[0], together[0], rtol=1e-4)
    assert name not in whole.param_groups[0]


@pytest.mark.parametrize(("kind", "name"), [(SSO, "radius_scaler"), (Spectra, "eps"), (SpectralClip, "c")])
def test_their_rules_hold(kind: Any, name: str) -> None:
    optimizer = kind(weights()[:1], lr=0.05)
    with pytest.raises(ValueError, match=rf"^{name}=-1.0 must "):
        optimizer.add_param_group({"params": weights()[1:], name: -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": weights()[1:]})
    train([p for g in optimizer.param_groups for p in g["params"]], [optimizer], range(2))


def test_a_group_that_is_taken_back_leaves_no_settings() -> None:
    """SPECTRA's warmup needs a peak; the group after the refused one has settings of its own, not its."""
    first, refused, last = (torch.nn.Parameter(torch.ones(4, 6)) for _ in range(3))
    optimizer = SpectralClip([first], lr=0.1, c_warmup_steps=5)
    with pytest.raises(ValueError, match="is not what a warmup of c_warmup_steps=5 ends at"):
        optimizer.add_param_group({"params": [refused], "lr": 0.0, "c": 2.0})
    optimizer.add_param_group({"params": [last], "c": 3.0})
    assert [optimizer.config_of(group).c for group in optimizer.param_groups] == [10.0, 3.0]


def test_the_page_and_the_tests_have_all() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for kind, others in OTHER.items():
        known = group_settings(kind.config_cls)
        assert set(others) == set(known)
        (row,) = re.findall(rf"^\| .*`{kind.__name__}`.* \| (`.*`) \|$", page, re.MULTILINE)
        assert tuple(row.replace("`", "").split(", ")) == known
        assert {f.name for f in dataclasses.fields(kind.config_cls)} >= set(known)
