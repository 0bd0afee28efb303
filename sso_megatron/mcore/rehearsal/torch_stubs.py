"""Replacements in torch by which code written for CUDA runs on the CPU, for a rehearsal.

There are three redirections, which ``redirect_torch`` installs once:

1. a ``TorchFunctionMode`` sends every tensor that is asked for on a CUDA device to the CPU;
2. the tables below replace functions of ``torch.cuda`` (and a few of ``torch.distributed``);
3. the data loader no longer draws from the CPU's only generator.

The code does not depend on Megatron; comments name the place in Megatron that needs an entry.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


def _device_on_cpu(device: Any) -> Any:
    """Return the CPU for a CUDA device, and anything else as it is.

    A CUDA device is given as ``"cuda"``, ``"cuda:1"``, ``torch.device`` or a bare index.
    """
    if isinstance(device, bool):  # bool is an int, but ``Tensor.to(dtype, True)`` means a flag
        return device
    if isinstance(device, int):  # torch.cuda.current_device() is passed on as a bare index
        return torch.device("cpu")
    if isinstance(device, str) and device.split(":")[0] == "cuda":
        return torch.device("cpu")
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


def _type_name(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Replace ``Tensor.type``: name a CPU tensor as if it were on a CUDA device."""
    if dtype is not None:
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return tensor.type(dtype, *args, **kwargs)
    return f"torch.cuda.{tensor.type().rpartition('.')[2]}"  # right inside a second mode, too


def _moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Replace ``Tensor.to``, whose target device may be positional, as in ``x.to("cuda")``."""
    return tensor.to(*(_device_on_cpu(arg) for arg in args[:1]), *args[1:], **kwargs)


# Tensor methods that are replaced here. All others are left to torch.
_TENSOR_METHODS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.cuda: lambda tensor, *args, **kwargs: tensor,  # model and batch are moved by it
    torch.Tensor.to: _moved,
    # The gradient clipper asserts torch.cuda.FloatTensor; Float16Optimizer and the distributed
    # optimizer sort parameters by this name.
    torch.Tensor.type: _type_name,
}


class _CudaMeansCpu(TorchFunctionMode):
    """Sends every tensor that is asked for on a CUDA device to the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        if "device" in kwargs:
            kwargs["device"] = _device_on_cpu(kwargs["device"])
        if "pin_memory" in kwargs:  # rope under context parallelism; only a GPU's driver can pin
            kwargs["pin_memory"] = False
        return _TENSOR_METHODS.get(func, func)(*args, **kwargs)


def _redirect_backward() -> None:
    """Keep the redirection on in backward passes.

    ``torch.autograd.backward`` is itself a function that a mode sees, and torch switches a mode
    off while it handles a function: Megatron's own backward functions would ask for CUDA tensors
    in vain. All of torch's calls of the autograd engine pass through one function.
    """
    run = torch.autograd.graph._engine_run_backward

    @functools.wraps(run)
    def run_redirected(*args: Any, **kwargs: Any) -> Any:
        with _CudaMeansCpu():
            return run(*args, **kwargs)

    for module in (torch.autograd, torch.autograd.graph):
        setattr(module, "_engine_run_backward", run_redirected)  # noqa: B010 (private, in stubs)


class _Stream:
    """Stands in for a CUDA stream. The CPU runs everything in order, so there is nothing to wait for."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept and ignore device and priority."""

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc_info: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None:
        """Do nothing."""

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def record_event(self, event: _Event | None = None) -> _Event:
        """Record ``event``, or a new event, and return it."""
        event = event or _Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Return True: all work is done."""
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the only priority that there is."""
        return (0, 0)


class _Event:
    """Stands in for a CUDA event: a point in time, recorded at once, because the CPU is never behind."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded_at = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        """Store the current time."""
        self._recorded_at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return True: the event has happened."""
        return True

    def elapsed_time(self, end: _Event) -> float:
        """Return the milliseconds from this event to ``end``."""
        return 1e3 * (end._recorded_at - self._recorded_at)


def _constant(value: Any) -> Callable[..., Any]:
    """Return a new function that takes any arguments and returns ``value``.

    Each name needs a new function: torch.compile tabulates the functions of torch.cuda and refuses to
    find one of them under two names.
    """
    return lambda *args, **kwargs: value


_THE_STREAM = _Stream()
_CPU_PROPERTIES = SimpleNamespace(
    name="cpu",
    major=8,
    minor=0,
    total_memory=0,
    multi_processor_count=os.cpu_count() or 1,
)

# torch.cuda.<name>: what Megatron calls outside the paths that adapt_arguments refuses.
_CUDA_FUNCTIONS: dict[str, Any] = {
    "is_available": _constant(True),  # initialize_megatron asserts it
    # 0 devices would skip the model-parallel groups and seeds; with 1, fork_rng stays quiet too.
    "device_count": _constant(1),
    "current_device": _constant(0),  # passed on as device=0, which _device_on_cpu understands
    "set_device": _constant(None),  # initialize_megatron, per local rank
    "get_device_properties": _constant(_CPU_PROPERTIES),  # validate_args reads the architecture
    # emerging_optimizers chooses its matrix products by it.
    "get_device_capability": _constant((_CPU_PROPERTIES.major, _CPU_PROPERTIES.minor)),
    "synchronize": _constant(None),  # timers, point-to-point communication, checkpoints
    # The optimizers of older torch versions and Megatron's MoE router ask for a graph capture.
    "is_current_stream_capturing": _constant(False),
    # Streams and events: DDP construction, overlapped reductions, MoE dispatch, timings.
    "Stream": _Stream,
    "Event": _Event,
    "current_stream": _constant(_THE_STREAM),
    "stream": lambda stream: contextlib.nullcontext(stream),
    # Random numbers. The CPU has one generator where CUDA code has two. The generator's
    # own methods are called: torch.manual_seed would call torch.cuda.manual_seed_all again.
    "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
    "manual_seed_all": lambda seed: torch.default_generator.manual_seed(int(seed)),
    "get_rng_state": lambda device=None: torch.default_generator.get_state(),
    "set_rng_state": lambda state, device=None: torch.default_generator.set_state(state),
    "default_generators": (torch.default_generator,),  # _set_cuda_rng_state sets it directly
    # Deferred until CUDA starts, which never happens: _set_cuda_rng_state would be lost.
    "_lazy_call": lambda callback, **kwargs: callback(),
}
_RANDOM_NAMES = ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state")

# torch.accelerator.<name>: how torch itself looks for a device (optimizers for a graph capture,
# data loaders for pinned memory, collectives for their tensors). It follows torch.cuda's
# is_available, so it has to report that there is no device.
_ACCELERATOR_FUNCTIONS: dict[str, Any] = {
    "is_available": _constant(False),
    "current_accelerator": _constant(None),
}


class _UnequalGather:
    """Waits for an asynchronous padded gather, and then removes the padding."""

    def __init__(self, work: Any, padded: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        self._work, self._padded, self._outputs = work, padded, outputs

    def wait(self, *args: Any) -> bool:
        """Wait for the gather and fill the callers' tensors."""
        if self._work is not None:  # None: this rank is outside the group, or it was synchronous
            self._work.wait(*args)
        for output, padded in zip(self._outputs, self._padded, strict=True):
            output.copy_(padded[: output.numel()].view_as(output))
        return True


def _gather_unequal(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``all_gather`` to pad tensors of unequal sizes, which NCCL accepts and Gloo does not."""

    @functools.wraps(all_gather)
    def gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = {output.numel() for output in tensor_list}
        if len(sizes) <= 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        longest = max(sizes)  # every rank holds the same list of sizes: no need to agree on it
        sent = tensor.new_zeros(longest)
        sent[: tensor.numel()].copy_(tensor.reshape(-1))
        padded = [tensor.new_empty(longest) for _ in tensor_list]
        work = all_gather(padded, sent, group=group, async_op=async_op)
        handle = _UnequalGather(work, padded, tensor_list)
        if async_op:
            return handle
        handle.wait()
        return None

    return gather


def _list_split_sizes(all_to_all: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``all_to_all_single`` to accept the MoE dispatcher's split sizes as tensors.

    The dispatcher copies split sizes from the GPU into NumPy arrays. It does not convert a tensor that
    is on the CPU from the start, but the collective accepts no tensor.
    """

    def listed(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    @functools.wraps(all_to_all)
    def exchange(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return all_to_all(
            output,
            input,
            listed(output_split_sizes),
            listed(input_split_sizes),
            group=group,
            async_op=async_op,
        )

    return exchange


def _keep_generator(iterate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``DataLoader.__iter__`` so that its seed for workers leaves the CPU's generator as it was.

    Only the first rank of a tensor-parallel group has a data loader. On a GPU its draw does not
    touch CUDA's generator; here it would, and the dropout masks of the group would differ.
    """

    @functools.wraps(iterate)
    def keep(self: Any) -> Any:
        state = torch.default_generator.get_state()
        try:
            return iterate(self)
        finally:
            torch.default_generator.set_state(state)

    return keep


# torch.distributed.<name>: calls of Megatron's that NCCL accepts and Gloo does not.
_COLLECTIVES: dict[str, Callable[..., Any]] = {
    "all_gather": _gather_unequal,
    "all_to_all_single": _list_split_sizes,
}


def redirect_torch() -> None:
    """Install the redirections for the rest of the process. Call it once, and only without CUDA."""
    for name, stand_in in _CUDA_FUNCTIONS.items():
        setattr(torch.cuda, name, stand_in)
    for name, stand_in in _ACCELERATOR_FUNCTIONS.items():
        setattr(torch.accelerator, name, stand_in)
    for name in _RANDOM_NAMES:  # the same functions under their second name
        setattr(torch.cuda.random, name, _CUDA_FUNCTIONS[name])
    for name, wrap in _COLLECTIVES.items():
        collective = wrap(getattr(dist, name))
        for module in (dist, dist.distributed_c10d):
            setattr(module, name, collective)
    loader = torch.utils.data.DataLoader
    setattr(loader, "__iter__", _keep_generator(loader.__iter__))  # noqa: B010 (mypy)
    _redirect_backward()
    _CudaMeansCpu().__enter__()
