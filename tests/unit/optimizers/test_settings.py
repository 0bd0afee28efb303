"""What SSO, MuonSphere and SpectralClip refuse, and that they say the value, the rule and the way out."""

import math

import pytest
import torch

from sso_megatron import SSO, MuonSphere, SpectralClip, SSOConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\); the default is 0.9"),
        (
            {"radius_scaler": 0.0},
            "radius_scaler=0.0 must be positive and finite; the default is 1.0",
        ),
        (
            {"radius_mode": "rms"},
            "radius_mode='rms' must be one of spectral_mup, identity, from_weights; the default",
        ),
        (
            {"scale_mode": "x"},
            "scale_mode='x' must be one of spectral_mup, align_adam_rms, spectral_kaiming",
        ),
        ({"retract_mode": "soft"}, "retract_mode='soft' must be one of hard, dynamic"),
        ({"tangent": "yes"}, "tangent='yes' must be one of solve, project, none"),
        ({"solver": "newton"}, "solver='newton' must be one of tracking, bisection"),
        ({"solver_trials": 1}, "solver_trials=1 must be at least 2; the default is 2"),
        ({"solver_tolerance": -1.0}, "solver_tolerance=-1.0 must be positive"),
        ({"msign_steps": 0}, "msign_steps=0 must be at least 1; the default is 8"),
        ({"coefficient_type": "cubic"}, "coefficient_type='cubic' must be one of .*polar_express"),
        ({"power_block": 0}, "power_block=0 must be at least 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be finite and not negative"),
        ({"lr": -1.0}, "lr=-1.0 must not be negative"),
        ({"lr": "0.1"}, "lr='0.1' must be a float"),
        ({"lr": torch.tensor(-1.0)}, r"lr=tensor\(-1.\) must not be negative"),
        ({"lr": torch.tensor([0.1])}, r"lr=tensor\(\[0.1000\]\) must be a float, or .* of shape \(\)"),
        ({"lr": torch.tensor(1)}, r"lr=tensor\(1\) must be a float, or a floating-point tensor"),
        (
            {"lr": torch.tensor(0.1, device="meta")},
            "must be a float, or .* on the device of its par",
        ),
        ({"msign_precision": "fp16"}, "msign_precision='fp16' must be one of fp32, tf32, bf16"),
        ({"symmetric_kernel": "triton"}, "symmetric_kernel='triton' needs msign_precision='bf16'; the def"),
    ],
)
def test_errors_name_value_rule_and_way_out(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSO([torch.nn.Parameter(torch.randn(4, 4))], **settings)


def test_other_errors() -> None:
    matrix = torch.nn.Parameter(torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"shape \(4,\) is no matrix; .*torch.optim.AdamW"):
        SSO([matrix, torch.nn.Parameter(torch.randn(4))])
    optimizer = SSO([matrix])
    for bad, message in (
        ({"params": [torch.nn.Parameter(torch.randn(5))]}, "is no matrix"),
        ({"params": [torch.nn.Parameter(torch.randn(0, 4))]}, "is no matrix"),
        (
            {"params": [torch.nn.Parameter(torch.randn(4, 4))], "msign_steps": 5},
            "msign_steps in a parameter group is not",
        ),
        ({"params": [torch.nn.Parameter(torch.randn(4, 4))], "lr": math.inf}, "lr=inf must not"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="'project' is not MuonSphere's"):
        MuonSphere([matrix], tangent="project")
    with pytest.raises(TypeError, match="not both"):
        SSO([matrix], config=SSOConfig(), momentum=0.5)
    with pytest.raises(TypeError, match="rho"):
        SSO([matrix], rho=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "sgd"}, "base='sgd' must be one of adamw, signum, ademamix; the default is 'adamw'"),
        ({"base": "ademamix"}, "ademamix_warmup_steps=0 must be given where train_steps is not"),
        ({"c": 0.0}, r"c=0.0 must lie in \[1e-6, 1e9\]; the default is 10.0"),
        ({"c": math.inf}, r"c=inf must lie in \[1e-6, 1e9\]"),
        ({"c": math.nan}, r"c=nan must lie in \[1e-6, 1e9\]"),
        ({"pre_clip_c": 1e-9}, r"pre_clip_c=1e-09 must be 0 or in \[1e-6, 1e9\]; the default is 0.0"),
        ({"eps": 0.0}, "eps=0.0 must be positive and finite"),
        ({"c_warmup_steps": -1}, "c_warmup_steps=-1 must be finite and not negative"),
        ({"c_warmup_steps": 2.5}, "c_warmup_steps=2.5 must be an integer; the default is 0"),
        ({"nesterov": "no"}, "nesterov='no' must be True or False; the default is True"),
        ({"c_final": 0.1}, "c_final=0.1 has an effect only with c_decay"),
        ({"lr_peak": 0.1}, "lr_peak=0.1 has an effect only with c_warmup_steps"),
        ({"c_decay": "sqrt"}, "c_decay='sqrt' needs c_decay_steps"),
        ({"c_decay": "sqrt", "c_decay_steps": 5}, "c_decay='sqrt' needs train_steps"),
        (
            {"c_decay": "sqrt", "c_decay_steps": 5, "c_warmup_steps": 6, "train_steps": 10},
            "c_decay_steps=5 must leave c_warmup_steps=6 of train_steps=10; the default is 0",
        ),
        (
            {"c_decay": "exp", "c_decay_steps": 5, "train_steps": 10},
            "c_final=0.0 must be above 0 with c_decay='exp'; the default is 0.0",
        ),
        ({"msign_steps": 6}, "msign_steps=6 must be at least 7; the default is 8"),
        ({"beta2": 1.0}, r"beta2=1.0 must lie in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be finite and not negative"),
        ({"apply_to": "1d"}, "apply_to='1d' must be one of all, 2d"),
        ({"lr": -1.0}, "lr=-1.0 must not be negative"),
    ],
)
def test_errors_of_spectral_clipping(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralClip([torch.nn.Parameter(torch.ones(4, 4))], **settings)
