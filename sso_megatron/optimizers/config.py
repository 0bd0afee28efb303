"""Settings of the spectral optimizers: the only place where a default is written.

Command-line flags and the tables in the documentation are generated from these dataclasses.
"""

import re
from dataclasses import dataclass
from typing import Literal

from sso_megatron.linalg.coefficients import coefficient_types
from sso_megatron.optimizers.settings import (
    DECAY,
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    at_least,
    check_fields,
    require,
    setting,
)


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
        rule=POSITIVE,
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
        rule=at_least(1),
    )
    mup_init: bool = setting(
        False,
        "draw the initial weights by global name, the same for every parallel layout, and put every "
        "spectral matrix on its sphere",
        "SSO paper, spectral muP",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                require(self, "exclude", False, f"must be regular expressions; {pattern!r} has {error}")


@dataclass(frozen=True)
class SSOConfig:
    """Settings of SSO and MuonSphere (arXiv 2601.08393)."""

    momentum: float = setting(
        0.9, "decay of the gradient's moving average", "paper", rule=DECAY, by_group=True
    )
    nesterov: bool = setting(True, "look ahead by one gradient", "paper", by_group=True)
    radius_mode: Literal["spectral_mup", "identity", "from_weights"] = setting(
        "spectral_mup",
        "radius R of the sphere: spectral_mup c*sqrt(d_out/d_in), identity c, from_weights c times the "
        "norm that the weight has at the first step: a pretrained model does not jump",
        "paper; from_weights ours",
    )
    radius_scaler: float = setting(
        1.0, "the factor c of the radius", "paper, fig. 5: 0.1 .. 10", rule=POSITIVE, by_group=True
    )
    scale_mode: Literal["spectral_mup", "align_adam_rms", "spectral_kaiming"] = setting(
        "spectral_mup",
        "factor of the update: spectral_mup R, align_adam_rms 0.2*sqrt(max(d_out,d_in)), "
        "spectral_kaiming sqrt(max(1,d_out/d_in))",
        "paper, eq. 16",
        by_group=True,
    )
    retract_mode: Literal["hard", "dynamic"] = setting(
        "hard",
        "hard scales the weight to the sphere, dynamic by 1 + alpha*lr*sign(R - sigma)",
        "paper, eq. 34",
    )
    retract_alpha: float = setting(0.05, "alpha of the dynamic retraction", "paper", rule=POSITIVE)
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
        2,
        "trials a step of the tracking solver: the last by msign, the others by a rough measure",
        "ours",
        rule=at_least(2),  # with one, the slope that the next start is reckoned with is never seen
    )
    solver_tolerance: float = setting(2e-4, "|h(lambda)| at which bisection stops", "paper", rule=POSITIVE)
    solver_max_iterations: int = setting(20, "halvings of the bisection", "paper", rule=at_least(1))
    msign_steps: int = setting(8, "Newton-Schulz steps", "paper", rule=at_least(1))
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
    power_block: int = setting(16, "vectors of the power iteration", "ours", rule=at_least(1))
    power_degree: int = setting(
        6, "degree of the power iteration's Chebyshev filter", "ours", rule=at_least(1)
    )
    weight_decay: float = setting(
        0.0,
        "decoupled weight decay of the matrices; hard retraction undoes it",
        "paper",
        rule=NOT_NEGATIVE,
        by_group=True,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        known = coefficient_types()
        is_known = self.coefficient_type in known
        require(self, "coefficient_type", is_known, f"must be one of {', '.join(known)}")
        has_products = self.symmetric_kernel == "torch" or self.msign_precision == "bf16"
        require(self, "symmetric_kernel", has_products, "needs msign_precision='bf16'")


@dataclass(frozen=True)
class SpectraConfig:
    """Settings of Spectra (arXiv 2602.11185)."""

    momentum: float = setting(
        0.95, "decay mu of the heavy ball M <- mu M + G", "paper", rule=DECAY, by_group=True
    )
    nesterov: bool = setting(False, "look ahead by one gradient: G + mu M instead of M", by_group=True)
    rank_ratio: float = setting(
        0.015,
        "singular values of the spike by the short side of the matrix; at least one",
        "paper",
        rule=Rule("lie in (0, 1)", lambda value: 0 < value < 1),
    )
    power_iterations: int = setting(
        1, "passes of the cached power iteration a step", "paper", rule=at_least(1)
    )
    update_rms: float = setting(
        0.2, "root mean square of the update's entries, by lr", "paper", rule=POSITIVE, by_group=True
    )
    eps: float = setting(
        1e-8,
        "added to the root mean square that is divided by; the paper's value is not known to us",
        rule=POSITIVE,
        by_group=True,
    )
    momentum_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "precision that the momentum is kept in; bf16 halves the optimizer's state"
    )
    weight_decay: float = setting(
        0.1,
        "decoupled weight decay of the matrices; the paper's value is not known to us",
        rule=NOT_NEGATIVE,
        by_group=True,
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class SpectralAdamConfig:
    """Settings of SpectralAdam."""

    high_threshold: float = setting(
        1.5,
        "ratio of the gradient's Frobenius norm to the last one's above which it is divided",
        "paper",
        rule=POSITIVE,
        by_group=True,
    )
    low_threshold: float = setting(
        0.67, "the ratio below which it is divided", "paper", rule=POSITIVE, by_group=True
    )
    period: int = setting(
        50,
        "it is also divided at every step that this divides, counted from 1",
        "paper",
        rule=at_least(1),
        by_group=True,
    )
    beta1: float = setting(
        0.9, "decay of the gradient's moving average; not published", rule=DECAY, by_group=True
    )
    beta2: float = setting(0.95, "decay of its square's; not published", rule=DECAY, by_group=True)
    eps: float = setting(
        1e-8, "AdamW's, also in the ratio of norms; not published", rule=POSITIVE, by_group=True
    )
    weight_decay: float = setting(
        0.1, "decoupled weight decay of the matrices", "paper", rule=NOT_NEGATIVE, by_group=True
    )

    def __post_init__(self) -> None:
        check_fields(self)
        is_ordered = self.low_threshold < self.high_threshold
        require(
            self, "low_threshold", is_ordered, f"must be less than high_threshold={self.high_threshold}"
        )


def _is_c(value: float) -> bool:
    """Return whether squares of the ratio of an update to this ``c`` stay within float32."""
    return 1e-6 <= value <= 1e9


@dataclass(frozen=True)
class SpectralClipConfig:
    """Settings of SPECTRA, spectral clipping of another optimizer's updates (arXiv 2603.14315)."""

    base: Literal["adamw", "signum", "ademamix"] = setting(
        "adamw", "optimizer whose updates are clipped", "paper"
    )
    c: float = setting(
        10.0,
        "spectral norm that no clipped update exceeds",
        "paper",
        rule=Rule("lie in [1e-6, 1e9]", _is_c),
        by_group=True,
    )
    c_warmup_steps: int = setting(
        0,
        "steps of the learning rate's warmup, over which c is c*lr_peak/lr; 0: c does not change",
        "paper: as long as the warmup",
        rule=NOT_NEGATIVE,
    )
    lr_peak: float = setting(
        0.0,
        "learning rate that the warmup ends at; 0: max_lr of the parameter group, or else the learning "
        "rate that the group is made with",
        "paper",
        rule=NOT_NEGATIVE,
    )
    c_decay: Literal["none", "linear", "sqrt", "cosine", "exp", "square"] = setting(
        "none", "how c falls over the last c_decay_steps", "paper; sqrt in its 780M and 820M runs"
    )
    c_decay_steps: int = setting(
        0, "the last steps, over which c falls", "paper: a fifth of them", rule=NOT_NEGATIVE
    )
    c_final: float = setting(
        0.0,
        "share of c that the decay ends at",
        "published code",
        rule=Rule("lie in [0, 1]", lambda value: 0 <= value <= 1),
    )
    train_steps: int = setting(
        0, "steps of the whole training, which c_decay and ademamix look at", rule=NOT_NEGATIVE
    )
    apply_to: Literal["all", "2d"] = setting(
        "all",
        "all: parameters that are no matrices are clipped too, by their norm; 2d: matrices alone",
        "paper",
    )
    one_dimensional: Literal["published", "continuous"] = setting(
        "published",
        "what clipping is to a vector v: v/sqrt(1+||v||^2/c^2), and published leaves those with ||v|| <= c "
        "as they are, which jumps at c",
        "published code; continuous ours",
    )
    pre_clip_c: float = setting(
        0.0,
        "c of clipping the gradients of matrices before anything else; 0: not",
        "paper: 0.1, optional",
        rule=Rule("be 0 or in [1e-6, 1e9]", lambda value: value == 0 or _is_c(value)),
    )
    beta1: float = setting(
        0.9, "adamw, ademamix: decay of the gradient's average", "paper", rule=DECAY, by_group=True
    )
    beta2: float = setting(
        0.95,
        "adamw: decay of the squared gradient's average",
        "SSO paper; this one 0.999",
        rule=DECAY,
        by_group=True,
    )
    eps: float = setting(
        1e-8, "adamw, ademamix: added to the root", "torch, apex", rule=POSITIVE, by_group=True
    )
    momentum: float = setting(
        0.95, "signum: decay of the gradient's average", "paper", rule=DECAY, by_group=True
    )
    nesterov: bool = setting(True, "signum: look ahead by one gradient", "paper", by_group=True)
    ademamix_beta2: float = setting(
        0.999, "ademamix: decay of the squared gradient's average", "paper", rule=DECAY
    )
    ademamix_beta3: float = setting(0.999, "ademamix: decay of the slow average", "paper", rule=DECAY)
    ademamix_alpha: float = setting(8.0, "ademamix: weight of the slow average", "paper", rule=NOT_NEGATIVE)
    ademamix_warmup_steps: int = setting(
        0,
        "ademamix: steps over which beta3 and alpha grow; 0: train_steps",
        "paper: all steps",
        rule=NOT_NEGATIVE,
    )
    msign_steps: int = setting(
        8,
        "Newton-Schulz steps",
        "ours; the paper has 10 of another iteration",
        rule=at_least(7),  # with six the table overshoots 1 by 1e-3, and so the clipped norm c
    )
    weight_decay: float = setting(
        0.1,
        "decoupled weight decay of the matrices; vectors have none",
        "paper",
        rule=NOT_NEGATIVE,
        by_group=True,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        fades = self.c_decay != "exp" or self.c_final > 0
        require(self, "c_final", fades, "must be above 0 with c_decay='exp'")
        decays = self.c_decay != "none"
        for name in ("c_decay_steps", "c_final"):
            require(self, name, decays or not getattr(self, name), "has an effect only with c_decay")
        warms_up = self.c_warmup_steps > 0
        require(self, "lr_peak", warms_up or not self.lr_peak, "has an effect only with c_warmup_steps")
        require(
            self, "c_decay", not decays or self.c_decay_steps > 0, "needs c_decay_steps, the steps it takes"
        )
        require(
            self, "c_decay", not decays or self.train_steps > 0, "needs train_steps, to know the last ones"
        )
        held = self.train_steps - (self.c_decay_steps if decays else 0)
        fits = not self.train_steps or self.c_warmup_steps <= held
        length = f"train_steps={self.train_steps}"
        if decays:
            rule = f"must leave c_warmup_steps={self.c_warmup_steps} of {length}"
            require(self, "c_decay_steps", fits, rule)
        require(self, "c_warmup_steps", fits, f"must not be more than {length}")
        knows = self.base != "ademamix" or self.ademamix_warmup_steps or self.train_steps
        rule = "must be given where train_steps is not; without a warmup give 1"
        require(self, "ademamix_warmup_steps", bool(knows), rule)
