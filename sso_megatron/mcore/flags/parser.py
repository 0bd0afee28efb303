"""Command-line flags, generated from the configuration dataclasses."""

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sso_megatron.mcore.flags.optimizers import OPTIMIZERS, config_classes, flag_fields, flags_of
from sso_megatron.mcore.flags.run_length import from_run_length
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.optimizers.settings import choices_of


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags and optimizer names to Megatron's parser."""
    for action in parser._actions:
        if "--optimizer" in action.option_strings and action.choices is not None:
            # A Megatron with the patches of patches/ has added our names already.
            action.choices = list(dict.fromkeys([*action.choices, *OPTIMIZERS]))
    for prefix, config_type in config_classes().items():
        group = parser.add_argument_group(title=f"sso_megatron: {config_type.__doc__}")
        for f in flag_fields(prefix):
            group.add_argument(
                flags_of(prefix, [f.name]), dest=f"{prefix}_{f.name}", **_action(config_type, f)
            )
    group = parser.add_argument_group(title="sso_megatron: records")
    group.add_argument(
        "--spectral-run-dir",
        metavar="DIR",
        help="write run.json, metrics.jsonl (losses, headlines), measures.jsonl (all that is measured) "
        "and summary.json into this folder",
    )
    group.add_argument(
        "--log-spectral-metrics",
        type=int,
        metavar="N",
        help="every N iterations, with any optimizer, measure what the step did to each weight, "
        "activations, attention logits and expert load; into --spectral-run-dir, TensorBoard and Weights "
        "& Biases",
    )
    group.add_argument(
        "--spectral-health",
        default="warn",
        metavar="{off,warn,stop}",
        help="with --log-spectral-metrics: warn names the module where a weight leaves its sphere, solves "
        "fail, activations explode or experts die; stop also ends all ranks, exit code 3 (default warn)",
    )
    group.add_argument(
        "--log-spectral-criterion",
        type=int,
        metavar="N",
        help="every N iterations, with any optimizer, write each weight's nuclear rank of the gradient, "
        "stable rank of the incoming activations and their ratio into --spectral-run-dir",
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
    """Return the configuration of the chosen optimizer, and the one that all our optimizers share.

    Raises:
        ValueError: a value breaks a rule of its setting; the message names the flag.
    """
    spec = OPTIMIZERS[args.optimizer]
    known = {**spec.fixed, **from_run_length(spec, args)}
    return config_from(args, spec.prefix, known), config_from(args, "spectral")


def config_from(
    args: argparse.Namespace, prefix: str, known: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """Return the configuration that the flags of a prefix describe.

    Args:
        args: Megatron's arguments.
        prefix: prefix of the flags, a key of ``config_classes``.
        known: values that override those of the flags, or of settings that have no flag.

    Raises:
        ValueError: a value breaks a rule of its setting; the message names the flag.
    """
    values = {f.name: getattr(args, f"{prefix}_{f.name}") for f in flag_fields(prefix)} | dict(known)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return config_classes()[prefix](**values)
    except ValueError as error:
        name, _, rest = str(error).partition("=")
        raise ValueError(f"{flags_of(prefix, [name])} {rest}") from None


def group_sizes(args: argparse.Namespace) -> dict[str, int]:
    """Return the number of ranks of each form of parallelism, from Megatron's validated arguments."""
    return {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
        "expert": args.expert_model_parallel_size,
        "expert_tensor": args.expert_tensor_parallel_size,
        "data": args.data_parallel_size,
    }
