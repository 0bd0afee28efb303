"""Computes singular values of chosen matrices over a run, from its checkpoints."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sso_megatron.mcore.offline import loading
from sso_megatron.mcore.parameters.layouts import has_rule, layout_of, model_parameters
from sso_megatron.mcore.parameters.names import expert_by_itself
from sso_megatron.optimizers.config import SpectralConfig

MAX_MATRICES = 16
MAX_CHECKPOINTS = 10
"""A figure can show this many checkpoints; of more, the first, the last and evenly spaced ones are read."""


@torch.no_grad()
def read(root: Path, pattern: re.Pattern[str]) -> dict[str, dict[int, Tensor]]:
    """Return exact singular values of logical matrices, by global name and iteration.

    Any optimizer's run in any layout is read in this process, one checkpoint at a time. Routed experts
    have the names that they have as modules of their own; embeddings and output layers are matrices, too.

    Args:
        root: folder that the run's ``--save`` named.
        pattern: regular expression that is searched for in the matrices' names.

    Returns:
        Float64 singular values on the CPU, in descending order; matrices are in the model's order.

    Raises:
        ValueError: no checkpoint, one of another format, too many matrices or none, or a matrix that is not
            finite.
    """
    folders = _some(loading.find_checkpoints(root))
    found: dict[str, dict[int, Tensor]] = {}
    with loading.single_rank():
        chunks: list[Any] = []
        for folder in folders:
            checkpoint = loading.read_checkpoint(folder, needs_spheres=False)
            if chunks:
                loading.load_weights_(chunks, checkpoint)
            else:
                chunks = loading.load_model(checkpoint)
            for name, W in _chosen(chunks, checkpoint.shared, pattern, root):
                if not W.isfinite().all():
                    raise ValueError(
                        f"{name} is not finite at iteration {checkpoint.iteration} of {root}; leave it "
                        f"out of --weights {pattern.pattern!r}, or that checkpoint out of the folder"
                    )
                values = torch.linalg.svdvals(W.double())
                found.setdefault(name, {})[checkpoint.iteration] = values.cpu()
    return found


def _some(folders: list[Path]) -> list[Path]:
    last = len(folders) - 1
    count = min(len(folders), MAX_CHECKPOINTS)
    return [folders[round(i * last / max(count - 1, 1))] for i in range(count)]


def _chosen(
    chunks: list[Any], shared: SpectralConfig, pattern: re.Pattern[str], root: Path
) -> Iterator[tuple[str, Tensor]]:
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    known, chosen = [], []
    for stored in model_parameters(chunks, groups):
        for p in stored.unpacked():
            if p.param.ndim != 2 or not (p.is_vocabulary or has_rule(p)):
                continue
            layout = layout_of(p, shared)
            for split in layout.splits:
                name = expert_by_itself(layout.matrix_name(split))
                known.append(name)
                if pattern.search(name):
                    chosen.append((name, split.read(p.param)))
    if not chosen:
        some = ", ".join([*known[:3], "..."])
        raise ValueError(f"--weights {pattern.pattern!r} is found in no matrix of {root}, such as {some}")
    if len(chosen) > MAX_MATRICES:
        raise ValueError(
            f"--weights {pattern.pattern!r} is found in {len(chosen)} matrices of {root}; name at most "
            f"{MAX_MATRICES}, such as {re.escape(chosen[0][0])!r}"
        )
    yield from chosen
