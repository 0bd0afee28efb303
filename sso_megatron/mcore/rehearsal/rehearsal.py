"""The start of a rehearsal, which runs Megatron without a GPU: the same training, on the CPU over Gloo.

Megatron asserts that CUDA exists. Where it does not, ``start_rehearsal`` redirects torch's CUDA
interface to the CPU, and ``adapt_arguments`` chooses the implementations that a CPU can run. The
training itself does not change: model, data, precision, schedule and optimizer stay as given. Where
CUDA exists, none of this applies, and ``start_rehearsal`` refuses to run.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import sys
import warnings
from argparse import Namespace
from typing import Any, NamedTuple

import torch

from sso_megatron.mcore.compat import private_api
from sso_megatron.mcore.rehearsal import attention as cpu_attention
from sso_megatron.mcore.rehearsal import experts as cpu_experts
from sso_megatron.mcore.rehearsal import hybrid as cpu_hybrid

_rehearsing = False


@functools.cache
def cuda_is_missing() -> bool:
    """Return whether this machine has no CUDA device.

    The answer is cached at the first call, before ``start_rehearsal`` makes torch claim a device.
    ``CUDA_VISIBLE_DEVICES=`` (empty) makes a GPU machine look like one without.
    """
    return not torch.cuda.is_available()


def rehearses() -> bool:
    """Return whether ``start_rehearsal`` has redirected CUDA to the CPU."""
    return _rehearsing


class _RngWarning(logging.Filter):
    """Drops Megatron's warning that the CPU's generator changed while it swapped CUDA's.

    On a GPU such a change hints at a bug; here both are the same generator, so it always changes.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()


def start_rehearsal() -> None:
    """Redirect CUDA to the CPU for the rest of the process. Further calls do nothing.

    One line is printed on global rank 0. No collective.

    Raises:
        RuntimeError: a CUDA device exists, or Megatron was imported before.
    """
    global _rehearsing
    if not cuda_is_missing():
        raise RuntimeError(
            "start_rehearsal() is for machines without a CUDA device, and this one has "
            f"{torch.cuda.device_count()}. Train on it directly, or hide it with "
            "CUDA_VISIBLE_DEVICES= (empty)."
        )
    if _rehearsing:
        return
    if "megatron.core.tensor_parallel.random" in sys.modules:
        raise RuntimeError(
            "start_rehearsal() must be called before megatron is imported: Megatron binds some "
            "of torch's CUDA functions at import. Move the call to the top of the program."
        )
    # Megatron's fused functions would otherwise each start a C++ compiler in every rank.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    # validate_args requires this under tensor parallelism; without CUDA it has no meaning.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    from sso_megatron.mcore.rehearsal.torch_stubs import redirect_torch

    redirect_torch()
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_RngWarning())
    # Megatron's data loaders always ask for pinned memory.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    # Each rank would print nine lines about packages that only a GPU could use.
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", message="Only transformer-engine>=")
    _rehearsing = True
    if os.environ.get("RANK", "0") == "0":
        print(
            "sso_megatron: no CUDA device found; rehearsing Megatron on the CPU over Gloo "
            "(same training semantics, slow).",
            flush=True,
        )


class _Refusal(NamedTuple):
    """A request that the CPU cannot carry out without changing what is trained."""

    name: str  # the argparse attribute
    allowed: tuple[Any, ...]  # the values that a CPU can do
    flag: str
    rule: str
    way_out: str = "leave it out"


_NEEDS_TE = "exists only in TransformerEngine, which needs a GPU"
_NEEDS_GRAPHS = "records CUDA graphs, which only a GPU has"
_MEASURES_GPU = "measures a GPU"
_NEEDS_COPIES = "relies on copies between GPU and host memory, which are one memory here"
_NO_FSDP = "use --use-distributed-optimizer"

_REFUSALS = (
    _Refusal("fp8", (None,), "--fp8-format", _NEEDS_TE, "use --bf16"),
    _Refusal("fp4", (None,), "--fp4-format", _NEEDS_TE, "use --bf16"),
    _Refusal(
        "transformer_impl",
        ("transformer_engine", "local"),  # adapt_arguments switches the former to the latter
        "--transformer-impl",
        "is for inference on a GPU",
    ),
    _Refusal("hybrid_context_parallel", (False,), "--hybrid-context-parallel", _NEEDS_TE),
    _Refusal(
        "moe_token_dispatcher_type",
        ("allgather", "alltoall"),
        "--moe-token-dispatcher-type",
        "needs DeepEP or another GPU library",
        "use alltoall",
    ),
    _Refusal("use_megatron_fsdp", (False,), "--use-megatron-fsdp", "needs NCCL", _NO_FSDP),
    _Refusal("use_torch_fsdp2", (False,), "--use-torch-fsdp2", "needs NCCL", _NO_FSDP),
    _Refusal("cuda_graph_impl", ("none",), "--cuda-graph-impl", _NEEDS_GRAPHS, "use none"),
    _Refusal("enable_cuda_graph", (False,), "--enable-cuda-graph", _NEEDS_GRAPHS),
    _Refusal("external_cuda_graph", (False,), "--external-cuda-graph", _NEEDS_GRAPHS),
    _Refusal("optimizer_cuda_graph", (False,), "--optimizer-cuda-graph", _NEEDS_GRAPHS),
    _Refusal("optimizer_cpu_offload", (False,), "--optimizer-cpu-offload", _NEEDS_COPIES),
    _Refusal("log_memory_to_tensorboard", (False,), "--log-memory-to-tensorboard", _MEASURES_GPU),
    _Refusal("log_device_memory_used", (False,), "--log-device-memory-used", _MEASURES_GPU),
    _Refusal("log_straggler", (False,), "--log-straggler", _MEASURES_GPU),
    _Refusal("record_memory_history", (False,), "--record-memory-history", _MEASURES_GPU),
    _Refusal("async_save", (False,), "--async-save", _NEEDS_COPIES),
    _Refusal(
        "fine_grained_activation_offloading",
        (False,),
        "--fine-grained-activation-offloading",
        _NEEDS_TE,
    ),
    _Refusal("cpu_offloading_num_layers", (0,), "--cpu-offloading-num-layers", _NEEDS_TE),
    _Refusal("use_precision_aware_optimizer", (False,), "--use-precision-aware-optimizer", _NEEDS_TE),
    _Refusal("layernorm_zero_centered_gamma", (False,), "--apply-layernorm-1p", _NEEDS_TE),
    _Refusal(
        "ddp_average_in_collective",
        (False,),
        "--ddp-average-in-collective",
        "needs a collective that averages, and Gloo has none",
    ),
)

# The arguments that are set, and why. None of them changes the mathematics of a step.
_SETTINGS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",  # TransformerEngine needs a GPU
    # Every weight is drawn whole and sharded afterwards: equal weights for every TP size.
    "use_cpu_initialization": True,
    "no_persist_layer_norm": True,  # an apex kernel; torch's LayerNorm asserts that it is off
    "gradient_accumulation_fusion": False,  # an apex kernel
    # Fused kernels: CUDA, TransformerEngine or Triton.
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "fused_residual_rmsnorm": False,
    "use_fused_weighted_squared_relu": False,
    "use_transformer_engine_op_fuser": False,
    "mla_down_proj_fusion": False,
    "cross_entropy_loss_fusion": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    # Schedules that overlap work on CUDA streams, and communication that only NCCL has.
    "delay_wgrad_compute": False,
    "overlap_moe_expert_parallel_comm": False,
    "moe_shared_expert_overlap": False,
    "tp_comm_overlap": False,
    "nccl_ub": False,
    "nccl_communicator_config_path": None,
    "use_sharp": False,
    "te_rng_tracker": False,
    "num_workers": 0,  # a loader process per rank would starve the few cores there are
}


def adapt_arguments(args: Namespace) -> None:
    """Choose the implementations that a CPU can run. Call it before ``validate_args``.

    ``transformer_impl`` is switched silently: its default, ``transformer_engine``, cannot be told from
    a request. Because of that, the local implementation also gets features that only
    TransformerEngine's has: sequence and context parallelism, multi-latent attention and grouped
    experts.

    Args:
        args: Megatron's parsed arguments; changed in place.

    Raises:
        ValueError: a flag asks for something that cannot be replaced, or whose replacement would change
            what is trained.
    """
    for name, allowed, flag, rule, way_out in _REFUSALS:
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            given = flag if value is True else f"{flag} {value}"
            raise ValueError(
                f"{given} cannot be rehearsed on the CPU: it {rule}. Either {way_out}, or run on "
                "a machine with a CUDA device."
            )
    if args.multi_latent_attention and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise ValueError(
            f"--multi-latent-attention with --tensor-model-parallel-size {args.tensor_model_parallel_size} "
            "needs --sequence-parallel: without it, Megatron does not sum the gradient of the part of "
            "the key that all heads share over the ranks that have the heads"
        )
    for name, value in _SETTINGS.items():
        if hasattr(args, name):  # the set of fusions differs between Megatron's versions
            setattr(args, name, value)

    from megatron.core.transformer.enums import AttnBackend

    args.attention_backend = AttnBackend.unfused
    _skip_warmup()
    _accept_sequence_parallel()
    cpu_attention.accept_latent_attention()
    cpu_attention.accept_context_parallelism()
    cpu_experts.accept_grouped_experts()
    pattern = args.hybrid_layer_pattern or args.hybrid_override_pattern  # the latter is its old name
    if pattern is not None:
        cpu_hybrid.accept_hybrid_model(pattern, args.qk_layernorm)


def leave_out_refused(args: Namespace) -> list[str]:
    """Reset the arguments that ``adapt_arguments`` would refuse, for a model that is not trained.

    None of these arguments decides which parameters there are. Call it before ``adapt_arguments``.

    Args:
        args: Megatron's parsed arguments; changed in place.

    Returns:
        The flags of the arguments that were reset.
    """
    left_out = []
    for name, allowed, flag, _, _ in _REFUSALS:
        if getattr(args, name, allowed[0]) not in allowed:
            left_out.append(flag)
            setattr(args, name, allowed[0])
    if args.multi_latent_attention and args.tensor_model_parallel_size > 1:
        args.sequence_parallel = True
    return left_out


def _skip_warmup() -> None:
    """Skip the warm-up of functions that are not compiled here.

    The warm-up draws random numbers, as many as the shard is wide. On a GPU they come from CUDA's
    generator; here they would come from the generator that draws the weights, and the initial weights
    would depend on the TP size.
    """
    private_api.replace("megatron.training.initialize:_warmup_jit_function", lambda tp_size=None: None)


@functools.cache
def _accept_sequence_parallel() -> None:
    """Make the local specification's norm accept sequence parallelism, as TransformerEngine's does.

    The local norm refuses sequence parallelism, which MoE under TP demands. The mathematics is the same:
    a norm acts on single tokens, and Megatron sums the gradient of a parameter that is marked.
    """
    path = "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__"
    build = private_api.existing(path)

    def build_marked(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if not config.sequence_parallel:
            return build(cls, config, *args, **kwargs)
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = build(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    private_api.replace(path, build_marked)
