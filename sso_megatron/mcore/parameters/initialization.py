"""Initial weights that do not depend on the parallel layout, with spectral muP."""

import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sso_megatron.linalg.power_iteration import power_iteration, start_basis
from sso_megatron.matrices.layout import Split, whole
from sso_megatron.matrices.scaling import target_radius
from sso_megatron.mcore.parameters.layouts import ModelParameter, has_rule, matrix_splits
from sso_megatron.mcore.parameters.names import expert_by_itself
from sso_megatron.optimizers.config import SpectralConfig, SSOConfig

# Random matrices have no gap below their largest singular value; with this many passes it is found to 1e-4.
_PASSES, _DEGREE, _BLOCK = 6, 8, 16
# Rows of a vocabulary drawn at a time: its padding depends on the tensor-parallel size, and the rows
# before the padding must not depend on it.
_VOCABULARY_ROWS = 128
_DOWN = re.compile(r"linear_fc2\.weight\d*$")
_FINEST = SpectralConfig(qkv_split="head", mlp_split="gate_up")


@torch.no_grad()
def initialize_by_name(
    parameters: Iterable[ModelParameter],
    spectral: Iterable[ModelParameter],
    sso: SSOConfig,
    shared: SpectralConfig,
) -> None:
    """Draw every matrix by its global name and put the spectral ones on their spheres.

    Each weight is drawn whole, with the model's own initialiser and a random state seeded by its name,
    and then sharded: the result is the same for every TP, PP, EP and DP size on one type of device, and
    for every way to store experts. Only a fused weight that no rule covers (and that is therefore
    excluded from the spectral optimizer) is sharded without regard to the matrices in it. Every logical
    matrix of a spectral weight is scaled to ``||W||_2 = R`` (spectral muP, arXiv 2601.08393). Norm
    weights, biases and other parameters that are no matrices stay as Megatron made them.

    Collectives: one broadcast of the seed over the world.

    Args:
        parameters: this rank's parameters.
        spectral: the parameters among them that the spectral optimizer takes.
        sso: configuration with the radius mode and scaler.
        shared: configuration with the granularity of the logical matrices.
    """
    spectral_ids = {id(p.param) for p in spectral}
    seed = _shared_seed()
    for p in parameters:
        if not (p.is_matrix or (p.is_vocabulary and p.param.ndim == 2)):
            continue
        for one in p.unpacked():
            weight = _draw(one, seed)
            if id(p.param) in spectral_ids:
                _put_on_sphere_(weight, one, sso, shared)
            _store_(weight, one)


def _shared_seed() -> int:
    """Return the first rank's torch seed, since Megatron's seeds differ between pipeline stages."""
    seed = [torch.initial_seed()]
    torch.distributed.broadcast_object_list(seed, src=0)
    return seed[0]


def _draw(p: ModelParameter, seed: int) -> Tensor:
    """Draw the whole weight in float32, laid out as on a single tensor-parallel rank."""
    rows, columns = p.param.shape
    rows *= p.tp_size if p.partition_dim == 0 else 1
    columns *= p.tp_size if p.partition_dim == 1 else 1
    device = p.param.device
    weight = torch.empty(rows, columns, dtype=torch.float32, device=device)
    name = expert_by_itself(p.name)
    if name.endswith("output_layer.weight") and getattr(p.param, "shared_embedding", False):
        name = "embedding.word_embeddings.weight"  # the last stage's copy of the tied embedding
    init = initializer_of(replace(p, name=name))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
        for block in weight.split(_VOCABULARY_ROWS if p.is_vocabulary else rows):
            init(block)
    return weight


def initializer_of(p: ModelParameter) -> Callable[[Tensor], Any]:
    """Return the model's own initialiser of a matrix, a function that fills a tensor in place."""
    if p.is_vocabulary and p.name.startswith("embedding."):
        return getattr(p.config, "embedding_init_method", None) or p.config.init_method
    if p.name.endswith(("linear_proj.weight", "fc2_latent_proj.weight")) or _DOWN.search(p.name):
        return p.config.output_layer_init_method
    return p.config.init_method


def _uncut(p: ModelParameter) -> ModelParameter:
    """Return the parameter as a single rank would store it, with the rows of gate above those of up."""
    return replace(p, partition_dim=None, tp_size=1, tp_rank=0, glu_interleave=0)


def _put_on_sphere_(weight: Tensor, p: ModelParameter, sso: SSOConfig, shared: SpectralConfig) -> None:
    for split in matrix_splits(_uncut(p), tuple(weight.shape), shared):
        W = split.read(weight).unsqueeze(0)
        top = power_iteration(W, start_basis(W, _BLOCK), degree=_DEGREE, num_passes=_PASSES)
        radius = target_radius(split.shape, sso.radius_mode, sso.radius_scaler)
        split.write_(weight, (W * (radius / top.sigma))[0])


def _store_(weight: Tensor, p: ModelParameter) -> None:
    """Copy this rank's shard of a whole weight into the parameter, matrix by matrix.

    The matrices are the finest there are, whatever the spectral optimizer takes as one matrix: the rows
    of gate and up that a rank holds, for example, are not contiguous in the whole weight.
    """
    stored = tuple(p.param.shape)
    if not has_rule(p):
        split = whole(stored, p.partition_dim, p.tp_size)
        split.write_(p.param, _shard(weight, split, p))
        return
    parts = {part.label: part for part in matrix_splits(_uncut(p), tuple(weight.shape), _FINEST)}
    for split in matrix_splits(p, stored, _FINEST):
        split.write_(p.param, _shard(parts[split.label].read(weight), split, p))


def _shard(values: Tensor, split: Split, p: ModelParameter) -> Tensor:
    """Return this rank's shard of a whole matrix."""
    if split.partition_dim is None:
        return values
    if split.shard_rows is not None:
        return values.split(split.shard_rows)[p.tp_rank]
    return values.chunk(p.tp_size, dim=split.partition_dim)[p.tp_rank]
