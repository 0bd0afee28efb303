"""Initial weights that do not depend on the parallel layout, with spectral muP."""

import zlib
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from sso_megatron.linalg.power_iteration import power_iteration, start_basis
from sso_megatron.matrices.scaling import target_radius
from sso_megatron.mcore.layouts import ModelParameter, matrix_splits
from sso_megatron.optimizers.config import SpectralConfig, SSOConfig

# Random matrices have no gap below their largest singular value; this many passes leave 1e-4.
_PASSES, _DEGREE, _BLOCK = 6, 8, 16
# Rows of a vocabulary drawn at a time: its padding depends on the tensor-parallel size, the rows
# before the padding must not.
_VOCABULARY_ROWS = 128


@torch.no_grad()
def initialize_by_name(
    parameters: Iterable[ModelParameter],
    spectral: Iterable[ModelParameter],
    sso: SSOConfig,
    shared: SpectralConfig,
) -> None:
    """Draw every 2-D weight by its global name and put the spectral ones on their spheres.

    Each weight is drawn whole, with the model's own initialiser and a random state that its name
    gives, then cut: the result is the same for every TP, PP, EP and DP size on one kind of device.
    Every logical matrix of a spectral weight is scaled to ``||W||_2 = R`` (spectral muP, arXiv
    2601.08393). Norm weights and biases stay as Megatron made them.

    Collectives: one broadcast of the seed over the world.

    Args:
        parameters: this rank's parameters.
        spectral: those that the spectral optimizer takes.
        sso: radius mode and scaler.
        shared: granularity of the logical matrices.
    """
    spectral_ids = {id(p.param) for p in spectral}
    seed = _shared_seed()
    for p in parameters:
        if p.param.ndim != 2:
            continue
        whole = _draw(p, seed)
        if id(p.param) in spectral_ids:
            _put_on_sphere_(whole, p, sso, shared)
        p.param.copy_(_cut(whole, p))


def _shared_seed() -> int:
    """The seed that torch has on the first rank: Megatron adds the pipeline stage's number to it."""
    seed = [torch.initial_seed()]
    torch.distributed.broadcast_object_list(seed, src=0)
    return seed[0]


def _draw(p: ModelParameter, seed: int) -> Tensor:
    """The whole weight in float32, stored as one tensor-parallel rank would store it."""
    rows, columns = p.param.shape
    rows *= p.tp_size if p.partition_dim == 0 else 1
    columns *= p.tp_size if p.partition_dim == 1 else 1
    device = p.param.device
    whole = torch.empty(rows, columns, dtype=torch.float32, device=device)
    name, config = p.name, p.config
    is_vocabulary = not p.is_matrix
    if name.endswith("output_layer.weight") and getattr(p.param, "shared_embedding", False):
        name = "embedding.word_embeddings.weight"  # the last stage's copy of the tied embedding
    init = config.init_method
    if is_vocabulary and name.startswith("embedding."):
        init = getattr(config, "embedding_init_method", None) or init
    elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        init = config.output_layer_init_method
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
        for block in whole.split(_VOCABULARY_ROWS if is_vocabulary else rows):
            init(block)
    return whole


def _put_on_sphere_(whole: Tensor, p: ModelParameter, sso: SSOConfig, shared: SpectralConfig) -> None:
    uncut = replace(p, partition_dim=None, tp_size=1, tp_rank=0)
    for split in matrix_splits(uncut, tuple(whole.shape), shared):
        W = split.read(whole).unsqueeze(0)
        top = power_iteration(W, start_basis(W, _BLOCK), degree=_DEGREE, num_passes=_PASSES)
        radius = target_radius(split.shape, sso.radius_mode, sso.radius_scaler)
        split.write_(whole, (W * (radius / top.sigma))[0])


def _cut(whole: Tensor, p: ModelParameter) -> Tensor:
    """This rank's shard; a gated MLP's two halves are cut each for itself."""
    if p.partition_dim is None:
        return whole
    # Not by partition_stride, which TransformerEngine's expert layers set back to 1.
    parts = whole.chunk(2 if p.is_gated else 1, dim=p.partition_dim)
    shards = [part.chunk(p.tp_size, dim=p.partition_dim)[p.tp_rank] for part in parts]
    return torch.cat(shards, dim=p.partition_dim)
