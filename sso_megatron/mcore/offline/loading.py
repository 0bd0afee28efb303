"""Loads a checkpoint of any parallel layout as one whole model in this process.

Megatron's own loader assembles the model. Weights are read in float32. Where the run was trained in
bfloat16 and saved its optimizer, the float32 master weights are read in place of their bfloat16 copies: the
optimizer steps on the masters, and the copies are already rounded. Without optimizer state the model's
weights are read as they are stored.
"""

import argparse
import contextlib
import copy
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sso_megatron.mcore import entry
from sso_megatron.mcore.checkpoint.compatibility import stored_contents
from sso_megatron.mcore.checkpoint.folders import TRACKER, is_complete, iteration_folder
from sso_megatron.mcore.checkpoint.pickles import find_foreign
from sso_megatron.mcore.compat.run_config import model_config
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS
from sso_megatron.mcore.flags.parser import config_from, configs_from
from sso_megatron.mcore.rehearsal import rehearsal
from sso_megatron.optimizers.config import SpectralConfig

_WITH_SPHERES = " and ".join(name for name, spec in OPTIMIZERS.items() if spec.has_spheres)
# Arguments that determine the matrices and the radii of their spheres; no default may take their place.
_DECISIVE = (
    *("optimizer", "sso_radius_mode", "sso_radius_scaler"),
    *("spectral_qkv_split", "spectral_mlp_split", "spectral_exclude", "spectral_tp_mode"),
)

# Arguments of a run that are reset to Megatron's defaults, which describe one rank and no side effects.
# None of them changes which weights the model has, and nothing is computed with the model.
_SPREAD = (
    *("tensor_model_parallel_size", "tensor_parallel_num_weight_shards", "gtp_weight_remat_size"),
    *("expert_tensor_parallel_num_weight_shards", "expert_gtp_weight_remat_size"),
    *("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
    *("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers"),
    *("decoder_last_pipeline_num_layers", "account_for_embedding_in_pipeline_split"),
    *("account_for_loss_in_pipeline_split", "context_parallel_size", "cp_comm_type"),
    *("hierarchical_context_parallel_sizes", "hybrid_context_parallel", "expert_model_parallel_size"),
    *("sequence_parallel", "num_distributed_optimizer_instances", "use_distributed_optimizer"),
    *("use_layer_wise_distributed_optimizer", "use_tp_pp_dp_mapping", "use_torch_fsdp2"),
    *("use_megatron_fsdp", "nccl_communicator_config_path", "use_sharp", "high_priority_stream_groups"),
)
_COMPUTING = (
    *("fp16", "bf16", "fp8", "fp4", "fp8_param_gather", "fp4_param_gather", "fp32_residual_connection"),
    *("layernorm_zero_centered_gamma", "apply_layernorm_1p", "cuda_graph_impl", "enable_cuda_graph"),
    *("external_cuda_graph", "optimizer_cuda_graph", "optimizer_cpu_offload", "cpu_offloading_num_layers"),
    *("fine_grained_activation_offloading", "use_precision_aware_optimizer", "recompute_granularity"),
    *("recompute_method", "recompute_num_layers", "ddp_average_in_collective"),
    *("moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm", "delay_wgrad_compute"),
    *("tp_comm_overlap", "gradient_accumulation_fusion", "init_model_with_meta_device"),
    *("moe_router_padding_for_fp8", "moe_router_padding_for_quantization", "fp8_output_proj"),
    *("first_last_layers_bf16", "activation_func_fp8_input_store"),
)
_LOADING = (
    *("async_save", "use_persistent_ckpt_worker", "pretrained_checkpoint", "non_persistent_ckpt_type"),
    *("non_persistent_global_ckpt_dir", "ckpt_fully_parallel_load", "ckpt_assume_constant_structure"),
    *("dist_ckpt_strictness", "override_ckpt_iteration", "exit_on_missing_checkpoint"),
    *("flight_recorder_dump_path", "config_logger_dir", "lazy_mpu_init"),
)


@dataclass(frozen=True)
class Checkpoint:
    """Describes a torch_dist checkpoint of a run.

    Attributes:
        folder: the folder of one iteration.
        iteration: iteration of the training.
        args: Megatron's validated arguments of the run.
        config: settings of the run's optimizer; None for one of Megatron's optimizers.
        shared: settings that all spectral optimizers share.
        common: entries that Megatron stored beside the tensors.
    """

    folder: Path
    iteration: int
    args: argparse.Namespace
    config: Any
    shared: SpectralConfig
    common: dict[str, Any]


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """Run a block in which this process is the only rank and can use Megatron, whatever started it.

    Output and warnings of Megatron and torch are hidden, because they are about training; errors are
    raised. At the end process groups and Megatron's global state are removed, so that another block can
    follow.
    """
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            entry.enter()
            yield
        finally:
            _forget_megatron()
            logging.disable(logging.NOTSET)


def _forget_megatron() -> None:
    from megatron.core import mpu, num_microbatches_calculator, rerun_state_machine
    from megatron.training import global_vars

    mpu.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    global_vars.destroy_global_vars()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def find_checkpoint(root: Path, step: int | None = None) -> Path:
    """Return the folder of one iteration's checkpoint, without reading tensors.

    Args:
        root: folder that the run's ``--save`` named.
        step: the iteration; None for the last one.

    Raises:
        ValueError: there is no such checkpoint, or it is incomplete or not of the torch_dist format.
    """
    tracker = root / TRACKER
    steps = sorted(int(path.name[5:]) for path in root.glob("iter_*") if path.name[5:].isdigit())
    if step is None:
        if not tracker.is_file():
            choose = f"choose one of its iterations, {_listed(steps)}, with --ckpt-step"
            way_out = choose if steps else "name what --save named"
            raise ValueError(f"{root} must be a folder of checkpoints with {TRACKER}; {way_out}")
        last = tracker.read_text().strip()
        name = "release" if last == "release" else f"iter_{last:0>7}"
    elif step in steps:
        name = iteration_folder(root, step).name
    else:
        raise ValueError(f"iteration {step} must be one that {root} holds: {_listed(steps)}")
    folder = root / name
    if is_complete(folder):
        return folder
    if not folder.is_dir():
        raise ValueError(f"{folder}, which {tracker} names, does not exist; it holds {_listed(steps)}")
    if any(folder.glob("mp_rank_*")):
        raise ValueError(
            f"{folder} is of the format torch and must be torch_dist, which alone is the same for every "
            "layout; convert it in its own layout with Megatron's --ckpt-convert-format torch_dist "
            "--ckpt-convert-save DIR"
        )
    raise ValueError(
        f"{folder} is no complete checkpoint; choose another of {_listed(steps)} with --ckpt-step"
    )


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def find_checkpoints(root: Path) -> list[Path]:
    """Return the folders of all complete iterations and the last checkpoint, without reading tensors.

    Raises:
        ValueError: see ``find_checkpoint``.
    """
    last = find_checkpoint(root)
    others = {path for path in root.glob("iter_*") if path.name[5:].isdigit() and is_complete(path)}
    return sorted(others | {last})


def read_checkpoint(folder: Path, *, needs_spheres: bool = True) -> Checkpoint:
    """Return arguments and settings of a checkpoint; ``entry.enter`` must have been called. No collectives.

    Args:
        folder: the folder of one iteration.
        needs_spheres: accept only a run that held its weights on spheres and stored which spheres.

    Raises:
        ValueError: the checkpoint would construct what is not on the list of ``checkpoint.pickles``; it has
            no arguments; or, with ``needs_spheres``, its weights were not on
            spheres, or on spheres that are unknown or depend on the layout.
    """
    from megatron.core.dist_checkpointing import load_common_state_dict

    if foreign := find_foreign(folder):
        raise ValueError(f"{foreign}; take a checkpoint that you trust")
    common = load_common_state_dict(str(folder))
    stored = common.get("args")
    if stored is None:
        raise ValueError(
            f"{folder} holds no arguments of its run; it must be one that Megatron's loop saved"
        )
    if needs_spheres:
        _check_spheres(folder, stored)
    args = argparse.Namespace(**{**vars(_default_arguments()), **vars(stored)})
    is_ours = args.optimizer in OPTIMIZERS
    config, shared = configs_from(args) if is_ours else (None, config_from(args, "spectral"))
    return Checkpoint(folder, int(common.get("iteration", 0)), args, config, shared, common)


def _check_spheres(folder: Path, stored: argparse.Namespace) -> None:
    spec = OPTIMIZERS.get(stored.optimizer)
    if spec is None or not spec.has_spheres:
        raise ValueError(
            f"{folder} was trained with --optimizer {stored.optimizer}: only {_WITH_SPHERES} "
            "hold weights on spheres, so there is nothing to retract; use it as it is"
        )
    missing = [name for name in _DECISIVE if not hasattr(stored, name)]
    if missing:
        raise ValueError(
            f"{folder} does not say its {', '.join(missing)}: another version of sso_megatron saved it, "
            "export it with that"
        )
    ranks = max(stored.tensor_model_parallel_size, stored.expert_tensor_parallel_size or 1)
    if stored.spectral_tp_mode == "blockwise" and ranks > 1:
        raise ValueError(
            f"--spectral-tp-mode blockwise over {ranks} ranks in {folder}: its spheres are those of "
            "shards, not of whole matrices; use it as it is"
        )


def _default_arguments() -> argparse.Namespace:
    """Return the arguments that Megatron parses from an empty command line."""
    from megatron.training import arguments

    given, sys.argv = sys.argv, sys.argv[:1]
    try:
        return arguments.parse_args()
    finally:
        sys.argv = given


def load_model(checkpoint: Checkpoint) -> list[Any]:
    """Build the checkpoint's model, whole and in float32, in this process alone, and load its weights.

    The process group of one rank that Megatron needs is made in this process, with neither a port nor an
    environment variable.

    Returns:
        The model's chunks.

    Raises:
        ValueError: this machine cannot build such a model.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import global_vars
    from megatron.training.initialize import initialize_megatron

    args = _for_one_rank(checkpoint)
    if rehearsal.cuda_is_missing():
        rehearsal.adapt_arguments(args)
    global_vars.set_args(args)
    initialize_megatron(store=torch.distributed.HashStore())
    config = model_config(args)
    chunks: list[Any] = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    load_weights_(chunks, checkpoint)
    return chunks


def load_weights_(chunks: list[Any], checkpoint: Checkpoint) -> None:
    """Load a checkpoint of the same run, in place, into the model that ``load_model`` returned."""
    from megatron.training import get_args
    from megatron.training.checkpointing import load_checkpoint

    get_args().ckpt_step = _step(checkpoint.folder)
    load_checkpoint(chunks, None, None)
    for chunk in chunks:
        _load_masters(chunk, checkpoint)


def _for_one_rank(checkpoint: Checkpoint) -> argparse.Namespace:
    """Return arguments that describe the same model on one rank.

    The stored arguments were validated when the run began. Megatron's validation would refuse some of its
    own results, so it is not repeated, and the values that it derives from the layout are set here.
    """
    args, defaults = copy.copy(checkpoint.args), _default_arguments()
    for name in (*_SPREAD, *_COMPUTING, *_LOADING):
        if hasattr(defaults, name):  # the set of flags differs between Megatron's versions
            setattr(args, name, getattr(defaults, name))
    one_rank = {
        **{"rank": 0, "local_rank": 0, "world_size": 1, "data_parallel_size": 1},
        **{"tensor_parallel_num_weight_shards": 1, "gtp_weight_remat_size": 1},
        **{"expert_gtp_weight_remat_size": 1, "expert_tensor_parallel_size": 1},
        **{"transformer_pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None},
        "params_dtype": torch.float32,
        "moe_token_dispatcher_type": "alltoall",  # allows every other setting of the experts
        "perform_initialization": False,  # every weight is loaded
        **{"load": str(checkpoint.folder.parent), "ckpt_step": _step(checkpoint.folder)},
        **{"finetune": True, "no_load_optim": True, "no_load_rng": True, "ckpt_format": "torch_dist"},
    }
    for name, value in one_rank.items():
        setattr(args, name, value)
    if args.hybrid_layer_pattern:  # the pattern without the borders of pipeline stages
        args.hybrid_layer_pattern = args.hybrid_layer_pattern.replace("|", "")
    return args


def _step(folder: Path) -> int | None:
    number = re.fullmatch(r"iter_(\d+)", folder.name)
    return int(number[1]) if number else None


def sharding_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return Megatron's metadata of a sharded state dict, by which a checkpoint's tensors are named."""
    from megatron.core import mpu
    from megatron.core.dist_checkpointing import load_content_metadata

    stored = load_content_metadata(preloaded_state_dict=checkpoint.common) or {}
    return {**stored, "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}


def _load_masters(chunk: Any, checkpoint: Checkpoint) -> None:
    """Load float32 master weights in place of the rounded weights, where the checkpoint has them."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    from sso_megatron.mcore.parameters.names import MASTER, STATE

    prefix, stored = f"{STATE}.{MASTER}", stored_contents(checkpoint.folder)
    weights = chunk.sharded_state_dict(metadata=sharding_metadata(checkpoint))
    masters = {
        name: make_sharded_optimizer_tensor(weight, weight.data, prefix=prefix)
        for name, weight in weights.items()
        if isinstance(weight, ShardedTensor | ShardedTensorFactory) and f"{prefix}.{weight.key}" in stored
    }
    if masters:
        loaded = dist_checkpointing.load({"masters": masters}, str(checkpoint.folder))
        unknown = chunk.load_state_dict(loaded["masters"], strict=False).unexpected_keys
        assert not unknown, unknown
