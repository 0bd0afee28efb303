"""Global names of a Megatron model's parameters, and the keys of optimizer state in a checkpoint."""

import re
from collections.abc import Callable
from typing import Any

STATE = "optimizer.state"
"""Prefix of the keys of a checkpoint's state tensors: ``<this>.<state name>.<Megatron's key>``."""

MASTER = "fp32_param"
"""The name that Megatron uses for the float32 master copy of a parameter."""

OPTIONAL_STATE = "optimizer.spectral."
"""Prefix of the keys of optimizer state in a checkpoint that the optimizer can do without."""

ROUTED_EXPERT = re.compile(
    r"(?:^|\.)experts\.(?:local_experts\.(?P<own>\d+)\.)?linear_fc(?P<fc>[12])\.weight(?P<gemm>\d*)$"
)
"""Matches weights of routed experts: in an expert's module, in a grouped product, or in one tensor."""

_EXPERT_NUMBER = re.compile(r"((?:^|\.)experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(\d+)")


def global_names(chunk: Any, first_expert: int) -> Callable[[str], str]:
    """Return a function from a model chunk's parameter names to global ones.

    Pipeline stages number their layers from 0 and expert-parallel ranks their experts; Megatron
    keeps the global layer number on each layer.

    Args:
        chunk: a Megatron module, wrapped or not.
        first_expert: global number of this rank's first routed expert.
    """
    numbers = {
        name: str(module.layer_number - 1)
        for name, module in chunk.named_modules()
        if re.search(r"(^|\.)layers\.\d+$", name) and hasattr(module, "layer_number")
    }

    def rename(name: str) -> str:
        parts = name.split(".")
        # Layers may hold layers: a layer of multi-token prediction has a stack of its own.
        renamed = [numbers.get(".".join(parts[: i + 1]), part) for i, part in enumerate(parts)]
        name = re.sub(r"^(module\.)+", "", ".".join(renamed))  # wrappers: DDP, Float16Module
        return _EXPERT_NUMBER.sub(lambda m: f"{m[1]}{int(m[2]) + first_expert}", name)

    return rename


def expert_by_itself(name: str) -> str:
    """Return the name that a routed expert's weight has where each expert is a module of its own.

    Args:
        name: name of a parameter, or of a logical matrix of it.
    """
    return re.sub(
        r"(^|\.)experts\.linear_fc([12])\.weight(\d+)(?=\[|$)",
        r"\1experts.local_experts.\3.linear_fc\2.weight",
        name,
    )


def of_other_experts(name: str, offset: int) -> str:
    """Return the name of a parameter or logical matrix on a rank whose experts have other numbers.

    Args:
        name: name of a parameter or logical matrix; only the names of routed experts' change.
        offset: number to add to the number of an expert.
    """
    name = _EXPERT_NUMBER.sub(lambda m: f"{m[1]}{int(m[2]) + offset}", name)
    return re.sub(r"(?<=\[expert)\d+", lambda m: str(int(m[0]) + offset), name)
