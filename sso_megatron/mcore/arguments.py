"""Command-line flags, generated from the configuration dataclasses."""

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sso_megatron.mcore import compat, cpu, model_building
from sso_megatron.mcore.kinds import CONFIGS, OPTIMIZERS, Kind, flag_fields, from_schedule, names_with
from sso_megatron.mcore.registration import register
from sso_megatron.optimizers.config import SpectralConfig, choices_of


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags and optimizer names to Megatron's parser."""
    for action in parser._actions:
        if "--optimizer" in action.option_strings and action.choices is not None:
            action.choices = [*action.choices, *OPTIMIZERS]
    for prefix, config_type in CONFIGS.items():
        group = parser.add_argument_group(title=f"sso_megatron: {config_type.__doc__}")
        for f in flag_fields(prefix):
            group.add_argument(
                _flags(prefix, [f.name]), dest=f"{prefix}_{f.name}", **_action(config_type, f)
            )
    group = parser.add_argument_group(title="sso_megatron: records")
    group.add_argument(
        "--spectral-run-dir",
        metavar="DIR",
        help="write metrics.jsonl (losses, spectral norms) and summary.json into this folder",
    )
    return parser


def _action(config_type: type, f: "dataclasses.Field[Any]") -> dict[str, Any]:
    hint = typing.get_type_hints(config_type)[f.name]
    # Choices are checked by the dataclass: its error is one line, argparse's repeats every flag.
    choices = choices_of(config_type, f.name)
    shown = f.default if f.default != () else "none"
    action: dict[str, Any] = {
        "default": f.default,
        "help": f"{f.metadata['help']} (default {shown})",
    }
    if hint is bool:
        return action | {"action": argparse.BooleanOptionalAction}
    if choices:
        return action | {"type": type(choices[0]), "metavar": "{" + ",".join(choices) + "}"}
    if typing.get_origin(hint) is tuple:
        return action | {"type": str, "nargs": "+", "metavar": "PATTERN"}
    return action | {"type": hint, "metavar": hint.__name__.upper()}


def configs_from(args: argparse.Namespace) -> tuple[Any, SpectralConfig]:
    """The configurations of the chosen optimizer and of what all share.

    Raises:
        ValueError: a value outside its rule; the message names the flag.
    """
    kind = OPTIMIZERS[args.optimizer]
    known = {**kind.fixed, **from_schedule(kind, args)}
    return _config(args, kind.prefix, known), _config(args, "spectral", {})


def _config(args: argparse.Namespace, prefix: str, known: dict[str, Any]) -> Any:
    values = {f.name: getattr(args, f"{prefix}_{f.name}") for f in flag_fields(prefix)} | known
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return CONFIGS[prefix](**values)
    except ValueError as error:
        name, _, rest = str(error).partition("=")
        raise ValueError(f"{_flags(prefix, [name])} {rest}") from None


def check_request(args: argparse.Namespace) -> None:
    """Refuse what cannot work with a spectral optimizer.

    Raises:
        ValueError: with the flag, the rule and the way out.
    """
    refused = {
        "fp16": "float16 gradients overflow the spectral step; use --bf16",
        "use_torch_fsdp2": "FSDP cuts matrices where no spectral step can see them; leave it out",
        "use_megatron_fsdp": "FSDP cuts matrices where no spectral step can see them; leave it out",
        "optimizer_cuda_graph": "a replay cannot skip a step whose gradient norm is not finite; leave it "
        "out",
        "optimizer_cpu_offload": "the spectral step runs on the device; leave it out",
        "use_precision_aware_optimizer": "gradients would be clipped for AdamW alone; leave it out",
        "fp8_param_gather": "matrices are gathered in the precision they are kept in; leave it out",
        "fp4_param_gather": "matrices are gathered in the precision they are kept in; leave it out",
        "overlap_param_gather_with_optimizer_step": "all parts of the optimizer step before parameters "
        "are gathered; use --overlap-param-gather alone",
        "loss_scale": "bf16 and fp32 need none, and the spectral step has none; leave it out",
    }
    for name, rule in refused.items():
        if getattr(args, name, False):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} with --optimizer {args.optimizer}: {rule}")
    _check_sharding(args)
    _check_combinations(args, OPTIMIZERS[args.optimizer])


def _check_combinations(args: argparse.Namespace, kind: Kind) -> None:
    """Refuse our own settings that contradict each other or do nothing."""
    if args.spectral_mup_init and args.sso_radius_mode == "from_weights":
        raise ValueError(
            "--sso-radius-mode from_weights with --spectral-mup-init: weights are drawn for radii that "
            "the weights themselves would give; leave one out"
        )
    if not kind.has_spheres:
        unknown = {
            "spectral_mup_init": "it keeps weights on no spheres",
            "use_mup": "its learning rates under muP are not known",
        }
        for name, rule in unknown.items():
            if getattr(args, name, False):
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} with --optimizer {args.optimizer}: {rule}; leave it out")
    if args.optimizer == "spectral_adam" and args.spectral_tp_mode == "owner":
        raise ValueError(
            "--spectral-tp-mode owner with --optimizer spectral_adam: its averages stay with the shards; "
            "use distributed"
        )
    if kind.prefix == "spectra_clip":
        base = kind.fixed["base"]
        idle = [n for n in _changed(args, kind.prefix) if base not in _BASES.get(n, (base,))]
        if idle:
            flags = _flags(kind.prefix, idle)
            raise ValueError(f"{flags} with --optimizer {args.optimizer}: has no effect; leave it out")
        without = [n for n in _changed(args, kind.prefix) if n in ("c_decay_steps", "c_final")]
        if without and args.spectra_clip_c_decay == "none":
            flags = _flags(kind.prefix, without)
            raise ValueError(
                f"{flags} has an effect only with --spectra-clip-c-decay; leave it out, or give that"
            )
    if args.optimizer == "muon_sphere":
        idle = [n for n in _changed(args, "sso") if n == "tangent" or n.startswith("solver")]
        if idle:
            raise ValueError(
                f"{_flags('sso', idle)} with --optimizer muon_sphere: MuonSphere does not look at "
                "the tangent space; leave it out, or use --optimizer sso"
            )
    for prefix in ("spectral", kind.prefix):
        for name in _changed(args, prefix):
            other, needed = _READ_ONLY_WITH.get(prefix, {}).get(
                name, (name, getattr(args, f"{prefix}_{name}"))
            )
            if getattr(args, f"{prefix}_{other}") != needed:
                raise ValueError(
                    f"{_flags(prefix, [name])} has an effect only with {_flags(prefix, [other])} {needed}; "
                    "leave one out, or give the other"
                )


def _check_sharding(args: argparse.Namespace) -> None:
    """Refuse ways to shard that would cut matrices, lose state or stop half-way."""
    using = f"with --optimizer {args.optimizer}"
    if not args.use_layer_wise_param_layout:
        raise ValueError(
            f"--no-use-layer-wise-param-layout {using}: whole matrices need that layout; leave it out"
        )
    for kind in ("tensor", "expert_tensor"):
        name = f"{kind}_parallel_num_weight_shards"
        ranks = args.expert_tensor_parallel_size if kind == "expert_tensor" else None
        shards = getattr(args, name, None)
        if shards is not None and shards > (ranks or args.tensor_model_parallel_size):
            raise ValueError(
                f"--{name.replace('_', '-')} {shards} {using}: matrices must not be cut beyond tensor "
                "parallelism; leave it out"
            )
    if args.num_distributed_optimizer_instances != 1:
        raise ValueError(
            f"--num-distributed-optimizer-instances {args.num_distributed_optimizer_instances} {using}: "
            "matrices are sharded over all data-parallel ranks; use 1"
        )
    saves = args.save is not None and not args.no_save_optim
    loads = args.load is not None and not (args.no_load_optim or args.finetune)
    if args.use_distributed_optimizer and args.ckpt_format == "torch" and (args.save is not None or loads):
        raise ValueError(
            f"--ckpt-format torch with --use-distributed-optimizer {using}: Megatron keeps its optimizer's "
            "state in files of single ranks then; use --ckpt-format torch_dist"
        )
    for name in ("mla_down_proj_fusion", "moe_single_grouped_weight"):
        if getattr(args, name, False) and (saves or loads):
            raise ValueError(
                f"--{name.replace('_', '-')} {using}: Megatron stores that weight in pieces, and the "
                "optimizer's state cannot be stored so yet; leave it out, or keep the model alone with "
                "--no-save-optim and --no-load-optim"
            )


# Settings that nothing looks at unless another one has this value.
_READ_ONLY_WITH = {
    "spectral": {"flops_per_byte": ("tp_mode", "auto")},
    "sso": {
        "solver": ("tangent", "solve"),
        "solver_trials": ("solver", "tracking"),
        "solver_tolerance": ("solver", "bisection"),
        "solver_max_iterations": ("solver", "bisection"),
        "retract_alpha": ("retract_mode", "dynamic"),
        "symmetric_kernel": ("msign_precision", "bf16"),
    },
    "spectra_clip": {"one_dimensional": ("apply_to", "all")},
}
# Settings of spectral clipping that some of its bases alone read.
_BASES = {
    "beta2": ("adamw",),
    **dict.fromkeys(("beta1", "eps"), ("adamw", "ademamix")),
    **dict.fromkeys(("momentum", "nesterov"), ("signum",)),
    **{f"ademamix_{name}": ("ademamix",) for name in ("beta2", "beta3", "alpha", "warmup_steps")},
}


def refuse_idle_flags(args: argparse.Namespace) -> None:
    """Refuse our flags with an optimizer that does not read them.

    Raises:
        ValueError: with the flags and the way out.
    """
    kind = OPTIMIZERS.get(args.optimizer)
    for prefix in CONFIGS:
        is_read = kind is not None and prefix in ("spectral", kind.prefix)
        changed = [] if is_read else _changed(args, prefix)
        if changed:
            raise ValueError(
                f"{_flags(prefix, changed)} with --optimizer {args.optimizer}: has no effect; leave it "
                f"out, or use --optimizer {names_with(prefix)}"
            )


def _changed(args: argparse.Namespace, prefix: str) -> list[str]:
    return [f.name for f in flag_fields(prefix) if getattr(args, f"{prefix}_{f.name}") != f.default]


def _flags(prefix: str, names: list[str]) -> str:
    return " ".join(f"--{prefix}-{name}".replace("_", "-") for name in names)


def check_and_register(args: argparse.Namespace) -> None:
    """Everything between parsing and Megatron's own validation, on parsed arguments.

    Raises:
        ValueError: see ``configs_from``, ``check_request`` and ``cpu.adapt_arguments``.
    """
    refuse_idle_flags(args)
    if args.optimizer in OPTIMIZERS:
        check_request(args)
        register(*configs_from(args))
        model_building.install()
    if cpu.cuda_is_missing():
        cpu.adapt_arguments(args)
    if args.spectral_run_dir is not None:  # on every rank: all of them stop before a process group exists
        _prepare_run_dir(Path(args.spectral_run_dir), goes_on=args.load is not None)


def _prepare_run_dir(folder: Path, goes_on: bool) -> None:
    """Make the folder for records; two runs never share one, but a resumed run adds to its own."""
    flag = f"--spectral-run-dir {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag}: cannot be made ({error}); name another folder") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag}: cannot be written to; name another folder")
    if (folder / "metrics.jsonl").exists() and not goes_on:
        raise ValueError(f"{flag}: holds the records of a run; name another, or go on with --load")


def fail(error: object) -> NoReturn:
    """One line on the standard error of each node's first rank, exit code 2 on every rank."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"sso_megatron: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def install() -> None:
    """Hook flags and checks into Megatron's argument module."""
    from megatron.training import arguments

    def with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda parser: add_arguments(original(parser))

    def with_checks(original: Callable[..., Any]) -> Callable[..., Any]:
        def validate_args(args: argparse.Namespace, *rest: Any, **named: Any) -> Any:
            try:
                check_and_register(args)
            except (ValueError, ImportError) as error:
                fail(error)
            return original(args, *rest, **named)

        return validate_args

    compat.wrap(arguments, "add_megatron_arguments", with_flags)
    compat.wrap(arguments, "validate_args", with_checks)
