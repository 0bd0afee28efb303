"""``sso-megatron export`` writes a checkpoint's weights exactly on their spheres, for evaluation."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sso_megatron.mcore.offline import export, loading
from sso_megatron.version import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_FILE_BYTES = 5_000_000_000
"""Largest size of a file of tensors, as Hugging Face has it; a larger tensor gets a file of its own."""

_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "padded_vocab_size", "max_position_embeddings", "num_experts", "moe_ffn_hidden_size"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sso-megatron export``."""
    parser.description = (
        "Write a checkpoint's weights exactly on their spheres. A step retracts weights before it updates "
        "them, so those in a checkpoint are off by one update. Any layout is read in one process, in "
        "float32: on the GPU if there is one, with CUDA_VISIBLE_DEVICES= (empty) in the host's memory. "
        "Weights of a run with --sso-retract-mode dynamic, which are only near their spheres, are put on "
        "them as well."
    )
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="what the run's --save named")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")
    add("--ckpt-step", type=int, metavar="N", help="iteration (default: the last one)")
    text = (
        "safetensors: model.safetensors (parted, with an index, from 5 GB on), one tensor for each logical "
        "matrix; megatron: a torch_dist checkpoint of the model alone (default: safetensors)"
    )
    add("--to", choices=("safetensors", "megatron"), default="safetensors", help=text)
    text = "of what is written; bfloat16 rounds weights off their spheres again (default: float32)"
    add("--dtype", choices=tuple(DTYPES), default="float32", help=text)


def run(options: argparse.Namespace) -> int:
    """Run the ``export`` command."""
    out = Path(os.path.abspath(options.out))
    if os.path.lexists(out):
        raise ValueError(f"--out {out} must not exist; name another folder, or remove it")
    folder = loading.find_checkpoint(options.load, options.ckpt_step)
    with loading.single_rank():
        checkpoint = loading.read_checkpoint(folder)
        chunks = loading.load_model(checkpoint)
        matrices = export.retract_(chunks, checkpoint)
        _publish(out, chunks, checkpoint, matrices, options)
    moves = [abs(matrix.norm / matrix.radius - 1) for matrix in matrices]
    print(
        f"{out}: iteration {checkpoint.iteration}, {len(matrices)} matrices on their spheres in "
        f"{options.dtype}, which were off by up to {max(moves, default=0.0):.2g} (relative)"
    )
    return 0


def _publish(
    out: Path,
    chunks: list[Any],
    checkpoint: loading.Checkpoint,
    matrices: list[export.ExportedMatrix],
    options: argparse.Namespace,
) -> None:
    """Write the model under another name and rename it, so that ``out`` is complete or does not exist."""
    dtype = DTYPES[options.dtype]
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output: same file system, so that the rename is atomic. The folder inside has the
    # permissions of any new folder, the temporary one has not.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as temporary:
        made = Path(temporary) / out.name
        made.mkdir()
        if options.to == "megatron":
            export.write_checkpoint(chunks, checkpoint, made, dtype)
        else:
            tensors = ((name, value.to(dtype)) for name, value in export.named_tensors(chunks, matrices))
            _write_safetensors(made, tensors, _metadata(checkpoint, len(matrices)))
        made.rename(out)


def _metadata(checkpoint: loading.Checkpoint, num_matrices: int) -> dict[str, str]:
    """Return the metadata of a file, as strings because safetensors keeps no other values."""
    args, sso, shared = checkpoint.args, checkpoint.config, checkpoint.shared
    sizes = {name: value for name in _SIZES if (value := getattr(args, name, None)) is not None}
    run = {
        "iteration": checkpoint.iteration,
        "optimizer": args.optimizer,
        "radius_mode": sso.radius_mode,
        "radius_scaler": sso.radius_scaler,
        "qkv_split": shared.qkv_split,
        "mlp_split": shared.mlp_split,
        "num_spectral_matrices": num_matrices,
        "sso_megatron": __version__,
        "format": "pt",  # what Hugging Face's readers look for
    }
    return {name: str(value) for name, value in {**sizes, **run}.items()}


def _write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str],
    limit: int = MAX_FILE_BYTES,
) -> None:
    """Write tensors in order into files of at most ``limit`` bytes, as Hugging Face names them.

    Args:
        folder: an empty folder.
        tensors: names and tensors; not more than a file of them is held in memory at once.
        metadata: written into every file.
        limit: bytes of tensors in a file.
    """
    from safetensors.torch import save_file

    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        parts.append(list(held))
        path = folder / f"part{len(parts)}"
        save_file(held, path, metadata)
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
        held.clear()

    for name, value in tensors:
        if held and size + value.nbytes > limit:
            flush()
            size = 0
        held[name] = value.cpu().clone(memory_format=torch.contiguous_format)  # a view holds its storage
        size += value.nbytes
        total += value.nbytes
    flush()
    if len(parts) == 1:
        (folder / "part1").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {**metadata, "total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
