"""Reads Megatron's command line for a plan, as a run would read it."""

import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sso_megatron.mcore.checkpoint.folders import TRACKER
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS, flags_of
from sso_megatron.mcore.flags.validation import check_criterion, check_metrics, check_request, unread_flags
from sso_megatron.mcore.rehearsal import hybrid as cpu_hybrid
from sso_megatron.mcore.rehearsal import rehearsal

# Flags that make a run write, read, wait or record: a plan needs none of that.
_SWITCHED_OFF = {
    "tensorboard_dir": None,
    "wandb_project": "",
    "spectral_run_dir": None,
    "log_spectral_criterion": None,
    "log_spectral_metrics": None,
    "spectral_health": "off",
    "enable_one_logger": False,
    "log_energy": False,
    "exit_signal_handler": False,
    "moe_use_upcycling": False,
    "skip_train": False,
    "load": None,
    "pretrained_checkpoint": None,
    "ckpt_convert_format": None,
    "exit_on_missing_checkpoint": False,
    "config_logger_dir": "",
    "dump_param_to_param_group_map": None,
}
_SIZES = (
    "num_layers",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
_UNREADABLE = ("yaml_cfg", "use_checkpoint_args", "perform_rl_step")


@dataclass(frozen=True)
class Request:
    """Holds what the flags ask for.

    Attributes:
        args: Megatron's arguments, validated.
        starts_from_checkpoint: whether the run loads its first weights.
        notes: what the plan's reader should know of how the flags were read.
    """

    args: Namespace
    starts_from_checkpoint: bool
    notes: list[str]


def read_flags(
    flags: Sequence[str],
    world_size: int | None,
    defaults: Mapping[str, Any],
    check: Callable[[Namespace], None],
) -> Request:
    """Parse and validate Megatron's flags, and set its global variables.

    Args:
        flags: flags of the command line.
        world_size: number of ranks of the run; None for the fewest that its layout can have.
        defaults: the script's defaults of flags that are not given.
        check: the script's function that raises for flags that it refuses.

    Raises:
        ValueError: a run would refuse a flag, too, or a plan cannot be made with it.
        AssertionError: Megatron refuses a flag.
    """
    from megatron.training import arguments, global_vars

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    sys.argv = ["sso-megatron plan", *flags]
    args = arguments.parse_args()
    if args.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"--optimizer {args.optimizer}: nothing is spectral, so there is nothing to plan; name one of "
            f"{', '.join(OPTIMIZERS)}"
        )
    for name in _UNREADABLE:
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')}: a plan does not read it; give the flags themselves"
            )
    for name in _SIZES:
        size = getattr(args, name)
        if size is not None and size < 1:
            raise ValueError(f"--{name.replace('_', '-')} {size} must be at least 1")
    check_request(args)
    check_criterion(args)
    check_metrics(args)
    check(args)
    _refuse_gpu_layers(args)
    notes = [_layers_note(args), *_decay_note(args, flags)]
    is_there = _checkpoint_is_there(args)
    if args.load and not is_there:
        notes.append(f"--load {args.load} holds no checkpoint here: planned for weights that are drawn")
    left_out = rehearsal.leave_out_refused(args)
    if left_out:
        notes.append(f"built without {' '.join(left_out)}, which change no parameter")
    unread = unread_flags(args)
    if unread:
        notes.append(unread)
    for name, value in _SWITCHED_OFF.items():
        if hasattr(args, name):
            setattr(args, name, value)
    fewest = _fewest_ranks(args)
    args.world_size = world_size or fewest
    if args.world_size % fewest:
        raise ValueError(
            f"--world-size {args.world_size} must be a multiple of {fewest}, which the layout needs; leave "
            "it out to plan for that many"
        )
    arguments.validate_args(args, dict(defaults))
    global_vars.set_global_variables(args)
    return Request(args, is_there, notes)


def _checkpoint_is_there(args: Namespace) -> bool:
    """Return whether the run starts from a checkpoint.

    ``--pretrained-checkpoint`` is taken to be there: without it the run would not start at all.
    """
    return bool(args.pretrained_checkpoint or (args.load and (Path(args.load) / TRACKER).is_file()))


def _refuse_gpu_layers(args: Namespace) -> None:
    pattern = args.hybrid_layer_pattern or args.hybrid_override_pattern
    found = cpu_hybrid.gpu_layer(pattern or "")
    if found is not None:
        symbol, name = found
        raise ValueError(
            f"--hybrid-layer-pattern {pattern}: {symbol} is a {name} layer. {name[0].upper()}{name[1:]} "
            "layers need GPU kernels, which a plan cannot build; plan a pattern without them"
        )


def _decay_note(args: Namespace, flags: Sequence[str]) -> Iterator[str]:
    """Yield a note where AdamW's weight decay may have been meant for the matrices."""
    is_given = any(flag.split("=")[0] == "--weight-decay" for flag in flags)
    prefix = OPTIMIZERS[args.optimizer].prefix
    has_adamw = prefix != "spectra_clip" or args.spectral_exclude
    ours = getattr(args, f"{prefix}_weight_decay", None)
    if is_given and args.weight_decay and has_adamw and ours is not None:
        yield (
            f"--weight-decay {args.weight_decay:g} reaches AdamW's parameters only; matrices have "
            f"{flags_of(prefix, ['weight_decay'])} ({ours:g})"
        )


def _layers_note(args: Namespace) -> str:
    if args.transformer_impl == "local":
        return "built with Megatron's local layers, as --transformer-impl local asks"
    return (
        "built with Megatron's local layers instead of TransformerEngine's: matrices are the same, but the "
        "norms before linear_qkv and linear_fc1 are parameters of those there"
    )


def _fewest_ranks(args: Namespace) -> int:
    """Return the fewest ranks that make up whole replicas of the dense part and of the experts."""
    tp, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    experts = (args.expert_tensor_parallel_size or tp) * args.expert_model_parallel_size * stages
    return math.lcm(tp * stages * args.context_parallel_size, experts)
