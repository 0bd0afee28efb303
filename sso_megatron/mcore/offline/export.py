"""Exports a checkpoint for evaluation, with its weights on their spheres.

A step retracts a weight before it updates it, so the weights in a checkpoint are off their spheres by one
update. Here every logical matrix is scaled in float64 to the radius that the run's own settings give it.
A matrix written in float32 is then on its sphere to about 1e-8, relative, and one written in bfloat16 to
some 1e-4: rounding moves an entry by up to 2^-9, the norm of a matrix by less.
"""

import argparse
import dataclasses
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sso_megatron.linalg.norms.spectral_norm import spectral_norm
from sso_megatron.matrices.layout import Split
from sso_megatron.matrices.scaling import target_radius
from sso_megatron.mcore.checkpoint.compatibility import stored_contents
from sso_megatron.mcore.checkpoint.folders import TRACKER, iteration_folder
from sso_megatron.mcore.offline.loading import Checkpoint, sharding_metadata
from sso_megatron.mcore.optimizer.registration import prepare_model
from sso_megatron.mcore.parameters.names import OPTIONAL_STATE, expert_by_itself, global_names
from sso_megatron.optimizers.config import SSOConfig


@dataclass(frozen=True)
class ExportedMatrix:
    """Describes a logical matrix of the model, which this process holds whole.

    Attributes:
        name: global name, the same for every way to store experts.
        param: the parameter that holds the matrix.
        split: the matrix's rows in ``param``.
        radius: spectral norm that the matrix was scaled to.
        norm: spectral norm that the matrix had in the checkpoint.
    """

    name: str
    param: Tensor
    split: Split
    radius: float
    norm: float


@torch.no_grad()
def retract_(chunks: list[Any], checkpoint: Checkpoint) -> list[ExportedMatrix]:
    """Scale every logical matrix of the model to its radius, in place.

    Returns:
        The matrices; no other parameter is changed.

    Raises:
        ValueError: a matrix's norm is 0 or not finite, or the checkpoint lacks its radius.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    # Weights are loaded: mup_init would draw them again.
    shared = dataclasses.replace(checkpoint.shared, mup_init=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    radius_of = _radii(checkpoint)
    matrices = []
    for param, layout in prepare_model(chunks, checkpoint.config, shared, groups):
        for split in layout.splits:
            name = expert_by_itself(layout.matrix_name(split))
            W, radius = split.read(param).double(), radius_of(name, split)
            norm = spectral_norm(W) if bool(W.isfinite().all()) else float("nan")
            if not norm > 0:
                raise ValueError(f"{name} in {checkpoint.folder} has norm {norm}: no place on a sphere")
            split.write_(param, W * (radius / norm))
            matrices.append(ExportedMatrix(name, param, split, radius, norm))
    return matrices


def _radii(checkpoint: Checkpoint) -> Callable[[str, Split], float]:
    """Return a function from a matrix's name and split to its radius."""
    sso: SSOConfig = checkpoint.config
    if sso.radius_mode != "from_weights":
        return lambda name, split: target_radius(split.shape, sso.radius_mode, sso.radius_scaler)
    radii = stored_radii(checkpoint.folder)

    def radius_of(name: str, split: Split) -> float:
        if name not in radii:
            raise ValueError(
                f"{name} has no radius in {checkpoint.folder}, and --sso-radius-mode from_weights has no "
                "other place for it; export a checkpoint that was saved with its optimizer's state"
            )
        return radii[name]

    return radius_of


def stored_radii(folder: Path) -> dict[str, float]:
    """Return the radii in a checkpoint's optimizer state, by the name of the logical matrix."""
    from torch.distributed.checkpoint import FileSystemReader, load

    keys = sorted(key for key in stored_contents(folder) if key.startswith(OPTIONAL_STATE))
    objects: dict[str, Any] = {key: io.BytesIO() for key in keys}
    if objects:
        load(objects, storage_reader=FileSystemReader(folder), no_dist=True)
    radii = {}
    for key, value in objects.items():
        if isinstance(value, io.BytesIO):
            value.seek(0)
            value = torch.load(value, weights_only=True)
        (state,) = value  # Megatron wraps the object of each shard in a list
        # The name is followed by the shard's number and their count; there is one shard.
        name = key.removeprefix(OPTIONAL_STATE).rpartition("/shard_")[0]
        if "radius" in state:
            radii[name] = float(state["radius"])
    return radii


def named_tensors(chunks: list[Any], matrices: list[ExportedMatrix]) -> Iterator[tuple[str, Tensor]]:
    """Yield global name and tensor of every logical matrix and every other weight or buffer."""
    held: dict[int, list[ExportedMatrix]] = {}
    for matrix in matrices:
        held.setdefault(id(matrix.param), []).append(matrix)
    for chunk in chunks:
        rename = global_names(chunk, 0)
        for local_name, value in chunk.state_dict(keep_vars=True).items():
            if id(value) in held:
                for matrix in held[id(value)]:
                    yield matrix.name, matrix.split.read(value.detach())
            elif isinstance(value, Tensor) and not local_name.endswith("._extra_state"):
                yield expert_by_itself(rename(local_name)), value.detach()


def write_checkpoint(chunks: list[Any], checkpoint: Checkpoint, root: Path, dtype: torch.dtype) -> None:
    """Write a torch_dist checkpoint of the model alone, which Megatron loads in any layout.

    Args:
        chunks: the model; its parameters are converted to ``dtype`` in place.
        checkpoint: source of the arguments and the iteration that are stored.
        root: an empty folder.
        dtype: dtype of the parameters; buffers keep their own.
    """
    from megatron.core import dist_checkpointing
    from megatron.training import get_args
    from megatron.training.checkpointing import generate_state_dict

    for chunk in chunks:
        for param in chunk.parameters():
            param.data = param.data.to(dtype)
    metadata = sharding_metadata(checkpoint)
    state = generate_state_dict(
        get_args(), chunks, None, None, None, checkpoint.iteration, model_sd_kwargs={"metadata": metadata}
    )
    state["args"] = argparse.Namespace(**vars(checkpoint.args))
    state["args"].no_save_optim = state["args"].no_save_rng = True
    flops = "num_floating_point_operations_so_far"
    state[flops] = checkpoint.common.get(flops, 0)
    folder = iteration_folder(root, checkpoint.iteration)
    folder.mkdir()
    del metadata["dp_cp_group"]
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    (root / TRACKER).write_text(str(checkpoint.iteration))
