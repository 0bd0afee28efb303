"""Settings of the spectral optimizers: the only place where a default is written.

Command-line flags and the tables in the documentation are generated from these dataclasses.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from sso_megatron.linalg.coefficients import coefficient_types


def setting(default: Any, help: str, source: str = "") -> Any:
    """A dataclass field with what its flag's help and the documentation say about it."""
    return field(default=default, metadata={"help": help, "source": source})


def require(config: Any, name: str, ok: bool, rule: str) -> None:
    """Raise ValueError with the setting's name, its value, the rule and the default unless ``ok``."""
    if not ok:
        raise ValueError(
            f"{name}={getattr(config, name)!r} {rule}; the default is {default_of(type(config), name)!r}"
        )


def default_of(config_type: type, name: str) -> Any:
    """The default of one field of a configuration dataclass."""
    return next(f.default for f in dataclasses.fields(config_type) if f.name == name)


def choices_of(config_type: type, name: str) -> tuple[Any, ...]:
    """The values that a ``Literal`` field may take; empty for another field."""
    hint = typing.get_type_hints(config_type)[name]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _check_choices(config: Any) -> None:
    for f in dataclasses.fields(config):
        choices = choices_of(type(config), f.name)
        if choices:
            listed = ", ".join(map(str, choices))
            require(config, f.name, getattr(config, f.name) in choices, f"must be one of {listed}")


@dataclass(frozen=True)
class SpectralConfig:
    """What every spectral optimizer shares: how matrices are found, spared and worked on."""

    tp_mode: Literal["auto", "duplicated", "distributed", "owner", "blockwise"] = setting(
        "auto",
        "how matrices that tensor parallelism cuts are worked on: duplicated gathers them on every "
        "rank, distributed leaves them and sums products, owner sends each to one rank of the group, "
        "auto takes the cheapest for each batch of equal matrices; blockwise takes each shard for a "
        "matrix of its own, which changes the result",
        "ours",
    )
    flops_per_byte: float = setting(
        200.0,
        "flops in the time of a byte between ranks, for tp_mode auto",
        "H100: 60 Tflop/s in float32, 300 GB/s over NVLink",
    )
    qkv_split: Literal["head", "group", "component", "whole"] = setting(
        "head",
        "logical matrices of linear_qkv and of latent attention's up projections: one per head, per "
        "query group, one each for Q, K and V, or the fused matrix",
        "SSO paper: per head",
    )
    mlp_split: Literal["gate_up", "whole"] = setting(
        "gate_up",
        "logical matrices of a gated linear_fc1: gate and up apart, or the fused matrix",
        "SSO paper: gate and up apart",
    )
    exclude: tuple[str, ...] = setting(
        (),
        "regular expressions: matrices whose global name one of them is found in go to AdamW; one "
        "that matches nothing is an error",
    )
    workspace_mib: int = setting(
        512,
        "temporary memory, in MiB, that a step may take, matrices on their way between ranks included; a "
        "matrix that does not fit is worked on alone, above it",
    )
    mup_init: bool = setting(
        False,
        "draw the initial weights by global name, the same for every parallel layout, and put every "
        "spectral matrix on its sphere",
        "SSO paper, spectral muP",
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        is_positive = 0 < self.flops_per_byte < math.inf
        require(self, "flops_per_byte", is_positive, "must be positive and finite")
        require(self, "workspace_mib", self.workspace_mib >= 1, "must be at least 1")


@dataclass(frozen=True)
class SSOConfig:
    """Settings of SSO and MuonSphere (arXiv 2601.08393)."""

    momentum: float = setting(0.9, "decay of the gradient's moving average", "paper")
    nesterov: bool = setting(True, "look ahead by one gradient", "paper")
    radius_mode: Literal["spectral_mup", "identity", "from_weights"] = setting(
        "spectral_mup",
        "radius R of the sphere: spectral_mup c*sqrt(d_out/d_in), identity c, from_weights c times the "
        "norm that the weight has at the first step: a pretrained model does not jump",
        "paper; from_weights ours",
    )
    radius_scaler: float = setting(1.0, "the factor c of the radius", "paper, fig. 5: 0.1 .. 10")
    scale_mode: Literal["spectral_mup", "align_adam_rms", "spectral_kaiming"] = setting(
        "spectral_mup",
        "factor of the update: spectral_mup R, align_adam_rms 0.2*sqrt(max(d_out,d_in)), "
        "spectral_kaiming sqrt(max(1,d_out/d_in))",
        "paper, eq. 16",
    )
    retract_mode: Literal["hard", "dynamic"] = setting(
        "hard",
        "hard scales the weight to the sphere, dynamic by 1 + alpha*lr*sign(R - sigma)",
        "paper, eq. 34",
    )
    retract_alpha: float = setting(0.05, "alpha of the dynamic retraction", "paper")
    tangent: Literal["solve", "project", "none"] = setting(
        "solve",
        "solve: the steepest tangent step (SSO); project: msign, then its radial part removed; "
        "none: msign alone (MuonSphere)",
        "paper",
    )
    solver: Literal["tracking", "bisection"] = setting(
        "tracking",
        "tracking follows lambda from step to step and rotates what is left of h away; bisection is the "
        "published search, its residual subtracted",
        "ours; paper",
    )
    solver_trials: int = setting(
        2, "trials a step of the tracking solver: the last by msign, the others by a rough measure", "ours"
    )
    solver_tolerance: float = setting(2e-4, "|h(lambda)| at which bisection stops", "paper")
    solver_max_iterations: int = setting(20, "halvings of the bisection", "paper")
    msign_steps: int = setting(8, "Newton-Schulz steps", "paper")
    coefficient_type: str = setting(
        "polar_express", "Newton-Schulz coefficients, by emerging-optimizers' names", "paper"
    )
    msign_precision: Literal["fp32", "tf32", "bf16"] = setting(
        "fp32",
        "precision of the Newton-Schulz products on whole float32 matrices; all else is in full precision",
        "ours",
    )
    symmetric_kernel: Literal["torch", "triton", "quack"] = setting(
        "torch",
        "for symmetric products of large matrices on a GPU, with msign_precision bf16: triton is "
        "emerging-optimizers' kernel, quack comes with the extra gpu",
        "ours",
    )
    power_block: int = setting(16, "vectors of the power iteration", "ours")
    power_degree: int = setting(6, "degree of the power iteration's Chebyshev filter", "ours")
    weight_decay: float = setting(
        0.0, "decoupled weight decay of the matrices; hard retraction undoes it", "paper"
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        require(self, "momentum", 0 <= self.momentum < 1, "must lie in [0, 1)")
        for name in ("radius_scaler", "retract_alpha", "solver_tolerance"):
            is_positive = 0 < getattr(self, name) < math.inf
            require(self, name, is_positive, "must be positive and finite")
        for name in _COUNTS:
            require(self, name, getattr(self, name) >= 1, "must be at least 1")
        # A single trial a step never sees the slope that the next start is reckoned with.
        require(self, "solver_trials", self.solver_trials >= 2, "must be at least 2")
        require(self, "weight_decay", self.weight_decay >= 0, "must not be negative")
        known = coefficient_types()
        is_known = self.coefficient_type in known
        require(self, "coefficient_type", is_known, f"must be one of {', '.join(known)}")
        has_products = self.symmetric_kernel == "torch" or self.msign_precision == "bf16"
        require(self, "symmetric_kernel", has_products, "needs msign_precision='bf16'")


_COUNTS = (
    "solver_max_iterations",
    "msign_steps",
    "power_block",
    "power_degree",
)
