# shellcheck shell=bash disable=SC2034  # train.sh reads it
# Environment of every rank, sourced by train.sh: the array `environment`, which a dry run prints.
#
# What is set already keeps its value. Only variables whose default would hurt are here; all but the
# first two are for NVIDIA GPUs, and none has been measured with this package yet. What depends on
# the cluster belongs into your job script: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME where a node
# has several networks and the wrong one is taken, NCCL_IB_HCA for the choice of InfiniBand cards.

environment=(
    # Lines of the log come when they are printed, and the last ones are not lost in a crash.
    PYTHONUNBUFFERED="${PYTHONUNBUFFERED-1}"
    # Threads of each rank's CPU work. torchrun chooses the same, with a warning.
    OMP_NUM_THREADS="${OMP_NUM_THREADS-1}"
    # One hardware queue, so that kernels start in the order of the calls. Megatron insists on it under
    # tensor and context parallelism before Blackwell: a collective must start before the GEMM that hides it.
    CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS-1}"
    # Temporary matrices of a spectral step have many shapes, MoE activations too; segments that can grow
    # keep the allocator from splitting the memory into pieces that fit none of them.
    PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}"
    # Such segments and NCCL's registration of a CUDA graph's buffers exclude each other; Megatron asserts it.
    NCCL_GRAPH_REGISTER="${NCCL_GRAPH_REGISTER-0}"
    # When a collective fails the log says why; without it there is only a time-out.
    NCCL_DEBUG="${NCCL_DEBUG-WARN}"
    # Tokenizers of Hugging Face warn, or hang, in forked data workers when they use threads.
    TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM-false}"
)
