"""Every flag reaches the optimizer."""

import argparse
import dataclasses
import typing
from typing import Any

import pytest

from helpers.megatron_runs import MOE, Megatron, tiny
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS, config_classes, flag_fields
from sso_megatron.mcore.flags.run_length import from_run_length

# A value that is not the default for every setting; a test below insists that none is missing.
OTHER: dict[str, dict[str, object]] = {
    "spectral": {
        "tp_mode": "owner",
        "flops_per_byte": 50.0,
        "qkv_split": "component",
        "mlp_split": "whole",
        "exclude": (r"layers\.1\.mlp", "linear_proj"),
        "workspace_mib": 7,
        "mup_init": True,
    },
    "sso": {
        "momentum": 0.8,
        "nesterov": False,
        "radius_mode": "identity",
        "radius_scaler": 2.0,
        "scale_mode": "align_adam_rms",
        "retract_mode": "dynamic",
        "retract_alpha": 0.1,
        "tangent": "project",
        "solver": "bisection",
        "solver_trials": 3,
        "solver_tolerance": 1e-3,
        "solver_max_iterations": 30,
        "msign_steps": 5,
        "coefficient_type": "quintic",
        "msign_precision": "tf32",
        "symmetric_kernel": "triton",
        "power_block": 4,
        "power_degree": 3,
        "weight_decay": 0.05,
    },
}
# Of the other optimizers, each taken all together.
FAMILY: dict[str, dict[str, object]] = {
    "spectra": {
        "momentum": 0.8,
        "nesterov": True,
        "rank_ratio": 0.1,
        "power_iterations": 2,
        "update_rms": 0.3,
        "eps": 1e-6,
        "momentum_dtype": "bf16",
        "weight_decay": 0.05,
    },
    "spectral_adam": {
        "high_threshold": 2.0,
        "low_threshold": 0.5,
        "period": 7,
        "beta1": 0.8,
        "beta2": 0.9,
        "eps": 1e-6,
        "weight_decay": 0.05,
    },
    "spectra_clip": {
        "c": 5.0,
        "c_warmup_steps": 1,
        "lr_peak": 2e-2,
        "c_decay": "sqrt",
        "c_decay_steps": 2,
        "c_final": 0.1,
        "train_steps": 9,
        "apply_to": "all",  # the other value leaves nothing for the next setting to do
        "one_dimensional": "continuous",
        "pre_clip_c": 0.1,
        "beta1": 0.8,
        "beta2": 0.9,
        "eps": 1e-6,
        "momentum": 0.8,
        "nesterov": False,
        "ademamix_beta2": 0.99,
        "ademamix_beta3": 0.99,
        "ademamix_alpha": 4.0,
        "ademamix_warmup_steps": 3,
        "msign_steps": 9,
        "weight_decay": 0.05,
    },
}
READ_BY = {
    "spectra_clip_adamw": ("beta1", "beta2", "eps"),
    "spectra_clip_signum": ("momentum", "nesterov"),
    "spectra_clip_ademamix": (
        *("beta1", "eps", "ademamix_beta2", "ademamix_beta3", "ademamix_alpha", "ademamix_warmup_steps"),
    ),
}


# Settings that nothing looks at unless another one has this value.
COMPANIONS = {
    "solver_tolerance": ("solver", "bisection"),
    "solver_max_iterations": ("solver", "bisection"),
    "retract_alpha": ("retract_mode", "dynamic"),
    "symmetric_kernel": ("msign_precision", "bf16"),
}


def test_every_setting_is_tested() -> None:
    for prefix, config_type in config_classes().items():
        fields, values = flag_fields(prefix), (OTHER | FAMILY)[prefix]
        assert values.keys() == {f.name for f in fields}
        for f in fields:
            choices = typing.get_args(typing.get_type_hints(config_type)[f.name])
            has_other = len(choices) != 1 and f.name != "apply_to"
            assert (values[f.name] != f.default) == has_other, f.name


def flags_of(prefix: str, values: dict[str, object]) -> list[object]:
    flags: list[object] = []
    for name, value in values.items():
        flag = f"--{prefix}-{name}".replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, *(value if isinstance(value, tuple) else [value])]
    return flags


@pytest.mark.parametrize("optimizer", ["spectra", "spectral_adam", *READ_BY])
def test_flags_of_the_family_arrive(megatron: Megatron, optimizer: str) -> None:
    prefix = OPTIMIZERS[optimizer].prefix
    read_by_others = {name for kind, names in READ_BY.items() if kind != optimizer for name in names}
    idle = read_by_others - set(READ_BY.get(optimizer, ())) if optimizer in READ_BY else set()
    values = {name: value for name, value in FAMILY[prefix].items() if name not in idle}
    found = settings(megatron, *flags_of(prefix, values), optimizer=optimizer)["config"]
    assert {name: found[name] for name in values} == values
    defaults = {f.name: f.default for f in dataclasses.fields(config_classes()[prefix])} | OPTIMIZERS[
        optimizer
    ].fixed
    assert {k: v for k, v in found.items() if k not in values} == {
        k: v for k, v in defaults.items() if k not in values
    }


def test_spectral_clipping_takes_everything_and_the_runs_schedule(megatron: Megatron) -> None:
    found = settings(megatron, optimizer="spectra_clip_ademamix")
    assert set(found["routes"].values()) == {"SpectralClip"}
    assert found["matrices"]["embedding.word_embeddings.weight"] == (128, 64)
    assert (found["config"]["train_steps"], found["config"]["c_warmup_steps"]) == (4, 2)
    assert all(group["max_lr"] == 1e-2 for group in found["groups"])


SCHEDULES = [
    ({"train_iters": 100, "lr_warmup_iters": 10}, (100, 10)),
    ({"train_iters": 100, "lr_warmup_fraction": 0.05}, (100, 5)),
    ({"train_iters": 100, "lr_decay_iters": 60, "lr_warmup_fraction": 0.1}, (100, 6)),
    ({"train_samples": 800, "lr_warmup_samples": 80}, (200, 20)),
    ({"train_samples": 800, "lr_warmup_samples": 80, "global_batch_size": None}, (100, 10)),
    ({"train_iters": 5, "lr_warmup_iters": 10}, (5, 5)),
    ({"train_iters": 50, "lr_warmup_iters": 5, "step_batch_size_schedule": "0:2 8:4"}, (50, 5)),
    ({"train_iters": 100, "lr_warmup_iters": 10, "spectra_clip_train_steps": 90}, (None, 10)),
]


@pytest.mark.parametrize(("given", "wanted"), SCHEDULES)
def test_schedule_of_the_run(given: dict[str, Any], wanted: tuple[int | None, int]) -> None:
    names = ("train_iters", "train_samples", "lr_decay_iters", "lr_decay_samples", "lr_warmup_fraction")
    unset = dict.fromkeys(names) | {"lr_warmup_iters": 0, "lr_warmup_samples": 0, "global_batch_size": 4}
    ours = {"spectra_clip_train_steps": 0, "spectra_clip_c_warmup_steps": 0}
    layout = {"world_size": 16, "micro_batch_size": 2, "step_batch_size_schedule": None}
    layout |= {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    layout |= {"context_parallel_size": 1, "step_batch_size_schedule": None}
    args = argparse.Namespace(**(unset | ours | layout | given))
    found = from_run_length(OPTIMIZERS["spectra_clip_adamw"], args)
    assert (found.get("train_steps"), found["c_warmup_steps"]) == wanted
    assert from_run_length(OPTIMIZERS["spectra"], args) == {}


@pytest.mark.parametrize(
    ("prefix", "name"), [(prefix, name) for prefix, settings in OTHER.items() for name in settings]
)
def test_flag_arrives_in_the_optimizer(megatron: Megatron, prefix: str, name: str) -> None:
    value = OTHER[prefix][name]
    flags = flags_of(prefix, {name: value})
    companion, needed = COMPANIONS.get(name, ("", ""))
    if companion:
        flags += flags_of("sso", {companion: needed})
    run = megatron.run(tiny(*flags), calls=("probes:settings",))
    found = run.saved("settings")[0]
    part = {"spectral": "shared", "sso": "config"}[prefix]
    assert found[part][name] == value
    changed = {
        (p, k)
        for p, kind in (("spectral", "shared"), ("sso", "config"))
        for k, v in found[kind].items()
        if v != next(f.default for f in dataclasses.fields(config_classes()[p]) if f.name == k)
    }
    assert changed <= {(prefix, name), ("sso", companion)}, "nothing else is touched"


def settings(megatron: Megatron, *flags: object, optimizer: str = "sso") -> dict:
    run = megatron.run(tiny(*flags, optimizer=optimizer), calls=("probes:settings",))
    return run.saved("settings")[0]


def test_muon_sphere_by_name(megatron: Megatron) -> None:
    found = settings(megatron, "--sso-msign-steps", 6, optimizer="muon_sphere")
    assert found["class"] == "MuonSphere"
    assert found["config"]["tangent"] == "none"
    assert found["config"]["msign_steps"] == 6


def test_the_learning_rate_arrives_too(megatron: Megatron) -> None:
    (group,) = settings(megatron, "--lr", "3e-3", "--lr-warmup-iters", 0)["groups"]
    assert group["lr"] == pytest.approx(3e-3)
    assert group["weight_decay"] == 0.0, "Megatron's 0.1 is for AdamW's parameters"


def test_splits_and_workspace_have_their_effect(megatron: Megatron) -> None:
    shapes = {
        ("head", "gate_up"): {(16, 64): 16, (64, 64): 2, (96, 64): 4, (64, 96): 2},
        ("group", "gate_up"): {(32, 64): 4, (16, 64): 8, (64, 64): 2, (96, 64): 4, (64, 96): 2},
        ("component", "whole"): {(64, 64): 4, (32, 64): 4, (192, 64): 2, (64, 96): 2},
        ("whole", "whole"): {(128, 64): 2, (64, 64): 2, (192, 64): 2, (64, 96): 2},
    }
    for (qkv, mlp), expected in shapes.items():
        flags = ["--spectral-qkv-split", qkv, "--spectral-mlp-split", mlp]
        found: dict[tuple[int, int], int] = {}
        for shape in settings(megatron, *flags)["matrices"].values():
            found[shape] = found.get(shape, 0) + 1
        assert found == expected
    # (96, 64) takes 4 * 24 KiB, four squares of 16 KiB and 12 KiB of vectors: five in one MiB.
    sizes = settings(megatron, "--spectral-workspace-mib", 1, "--num-layers", 3)["batches"]
    assert [n for n, shape in sizes if shape == (96, 64)] == [5, 1]


def test_exclusions_go_to_adamw(megatron: Megatron) -> None:
    found = settings(megatron, "--spectral-exclude", r"layers\.1\.mlp", "linear_proj")
    for name, optimizer in found["routes"].items():
        if "layers.1.mlp" in name or "linear_proj" in name:
            assert optimizer == "AdamW"
    assert len(found["matrices"]) == 16 + 3


def test_flags_of_an_adamw_that_gets_nothing_are_named(megatron: Megatron) -> None:
    argv = tiny("--adam-beta2", 0.9, "--weight-decay", 0.3, optimizer="spectra_clip_adamw")
    line = (
        "sso_megatron: --adam-beta2 0.9 --weight-decay 0.3: not read, since --optimizer spectra_clip_adamw"
    )
    assert megatron.run(argv, 2).log.count(line) == 1
    for others in (["--spectral-exclude", "embedding"], ["--optimizer", "spectra"]):
        assert "not read" not in megatron.run([*argv, *others]).log
    assert "not read" not in megatron.run(tiny(optimizer="spectra_clip_adamw")).log


def test_every_embedding_goes_to_adamw(megatron: Megatron) -> None:
    """Learned positions too, which Megatron's own rule would send to the matrix optimizer.

    What is on no sphere is drawn with Megatron's deviations: here 0.5 for embeddings, by default 0.02, and
    by the root of twice the layers less for what is added to the residual stream.
    """
    argv = ["--position-embedding-type", "learned_absolute", "--embedding-init-method-std", 0.5]
    argv += ["--spectral-mup-init", "--spectral-exclude", "linear_proj", "linear_fc2"]
    found = settings(megatron, *argv)
    embeddings = {name: route for name, route in found["routes"].items() if "embedding" in name}
    assert set(embeddings.values()) == {"AdamW"} and len(embeddings) == 2
    ends = ("embeddings.weight", "output_layer.weight", "linear_proj.weight", "linear_fc2.weight")
    deviations = {name: std for name, std in found["deviations"].items() if name.endswith(ends)}
    assert len(deviations) == 2 + 1 + 2 * 2
    for name, deviation in deviations.items():
        wanted = 0.5 if "embedding" in name else 0.02 if "output_layer" in name else 0.02 / 2
        # 2048 draws and more: their deviation is known to 1.6 per cent.
        assert deviation == pytest.approx(wanted, rel=0.08), name


def test_moe_flags_reach_experts(megatron: Megatron) -> None:
    """Both the dense and the expert optimizer get the settings."""
    run = megatron.run(tiny(*MOE, "--sso-msign-steps", 6), calls=("probes:settings",))
    found = run.saved("settings")[0]
    assert found["config"]["msign_steps"] == 6
    assert sum("local_experts" in name for name in found["matrices"]) == 12
