"""Counts what a step does: flops, host synchronisations, collectives, temporary memory.

Each meter is a context manager that counts while it is entered, and keeps its figures afterwards. Meters
may be nested in any order, except that ``Flops`` belongs outermost: it decomposes some operators, and the
other meters must see these whole.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Meter:
    """A context manager that enters several others; a subclass lists them."""

    def __init__(self, contexts: Sequence[contextlib.AbstractContextManager[Any]]) -> None:
        """Take the contexts to enter, outermost first."""
        self._contexts = contexts
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for context in self._contexts:
            self._stack.enter_context(context)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


class Flops(Meter):
    """Counts flops of matrix products as torch's ``FlopCounterMode`` does.

    A multiply-add is two flops, in any precision. Elementwise work, QR and eigenproblems count
    nothing, nor do kernels that torch has no formula for.
    """

    def __init__(self) -> None:
        """Make the meter."""
        self._counter = FlopCounterMode(display=False)
        super().__init__([self._counter])

    @property
    def total(self) -> int:
        """Number of flops so far."""
        return int(self._counter.get_total_flops())


# Operators that a CUDA device makes the host wait for, by the name under torch.ops.aten: their result
# is a number on the host, their output's size depends on values, or they look at an error code.
_SYNCHRONISING = frozenset(
    (
        *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select"),
        *("_unique2", "unique_dim", "unique_consecutive", "bincount", "_linalg_check_errors"),
        *("_linalg_eigh", "_linalg_svd", "linalg_eig", "_linalg_eigvals", "linalg_lstsq", "linalg_pinv"),
    )
)
# Functions that lead to the host, but call no operator when a tensor is on the CPU already.
_TO_THE_HOST = frozenset(("tolist", "numpy", "__array__", "__dlpack__", "__repr__", "cpu"))


class HostSyncs(Meter):
    """Counts how often the host waits for the device.

    On CUDA torch itself reports it (``torch.cuda.set_sync_debug_mode``), and ``sources`` has files and
    lines. On the CPU nothing ever waits; what would wait on a CUDA device is counted, by operator. That
    finds numbers read (``item``, ``tolist``, ``if tensor``, tensors as scalars or in slices), sizes
    that depend on values (``nonzero``, ``where`` of one argument, ``unique``, indexing with a mask),
    ``equal`` and ``allclose``, ``torch.linalg`` functions that check their success (not ``_ex``, nor
    ``qr``), ``.cpu()``, ``.to("cpu")``, and Python numbers put on a device
    (``torch.tensor(..., device=...)``). A tensor that is made for the host on purpose cannot be
    distinguished there from one of the device, unless ``on_host`` names it. ``torch.tensor`` without a
    device, and ``.to(x.device)``, are free.

    Attributes:
        sources: how often each operator, or line, made the host wait.
    """

    def __init__(self, device: torch.device | str = "cpu", on_host: Iterable[Tensor] = ()) -> None:
        """Make the meter.

        Args:
            device: where the tensors are.
            on_host: tensors that a run on CUDA has on the host too; reading them counts nothing.
        """
        self.sources: Counter[str] = Counter()
        self._on_host = {storage._cdata for storage in _storages(list(on_host))}
        is_cuda = torch.device(device).type == "cuda"
        super().__init__(
            [self._cuda_warnings()]
            if is_cuda
            else [_OnOperators(self._on_operator), _OnFunctions(self._on_function)]
        )

    @property
    def count(self) -> int:
        """Number of synchronisations so far."""
        return self.sources.total()

    def _on_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = func._overloadpacket.__name__
        if self._on_host and any(storage._cdata in self._on_host for storage in _storages(args[:1])):
            return
        if name in _SYNCHRONISING:
            self.sources[name] += 1
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                self.sources[f"{name} with a mask"] += 1
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.sources[name] += 1

    def _on_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = getattr(func, "__name__", "")
        if name in _TO_THE_HOST:
            self.sources[name] += 1
        elif name == "to" and "cpu" in (*args[1:2], kwargs.get("device")):
            self.sources["to cpu"] += 1
        elif name in ("tensor", "as_tensor") and kwargs.get("device") and not isinstance(args[0], Tensor):
            self.sources[f"{name} on a device"] += 1

    @contextlib.contextmanager
    def _cuda_warnings(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if "synchronizing" in str(warning.message):
                self.sources[f"{warning.filename}:{warning.lineno}"] += 1


class Collectives(Meter):
    """Counts the collectives of ``torch.distributed`` that this rank takes part in, on any backend.

    Received bytes are the bytes that the usual algorithms imply for a group of ``p`` ranks: for all-gather
    ``(p - 1) / p`` of the output, for reduce-scatter the same of the input, for all-reduce both, for
    all-to-all what comes from other ranks, for broadcast and scatter the tensor on all ranks but the root,
    for gather and reduce the tensor on the root.

    Attributes:
        calls: number of calls by collective.
        received: received bytes by collective.
    """

    def __init__(self) -> None:
        """Make the meter."""
        self.calls: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        super().__init__([_OnOperators(self._on_operator)])

    @property
    def count(self) -> int:
        """Number of calls so far."""
        return self.calls.total()

    @property
    def received_bytes(self) -> int:
        """Number of received bytes so far."""
        return self.received.total()

    def _on_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func.namespace != "c10d":
            return
        operator = func._overloadpacket.__name__
        if operator not in _COLLECTIVES:
            raise NotImplementedError(f"torch.ops.c10d.{operator}: no rule says how many bytes it moves")
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        group = given.get("process_group")
        if isinstance(group, torch.ScriptObject):
            group = dist.ProcessGroup.unbox(group)
        name, received = _COLLECTIVES[operator]
        self.calls[name] += 1
        self.received[name] += received(given, group) if group is not None else 0


Arguments = dict[str, Any]


def _num_bytes(tensors: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))


def _from_others(argument: str, times: int = 1) -> Callable[[Arguments, Any], int]:
    """Return a function that counts ``times (p - 1) / p`` of an argument's bytes."""
    return lambda given, group: times * _num_bytes(given[argument]) * (group.size() - 1) // group.size()


def _if_root(argument: str, is_root: bool) -> Callable[[Arguments, Any], int]:
    """Return a function that counts an argument's bytes on the root, or on all ranks but the root."""
    return lambda given, group: (
        _num_bytes(given[argument]) if (group.rank() == given["root_rank"]) == is_root else 0
    )


def _gathered_on_root(given: Arguments, group: Any) -> int:
    return _from_others("output_tensors")(given, group) if group.rank() == given["root_rank"] else 0


def _exchanged(given: Arguments, group: Any) -> int:
    output, splits = given["output"], given["output_split_sizes"]
    own = output.nbytes // group.size()
    if splits:
        own = output.nbytes * splits[group.rank()] // max(1, sum(splits))
    return output.nbytes - own


def _exchanged_lists(given: Arguments, group: Any) -> int:
    outputs = given["output_tensors"]
    return _num_bytes(outputs) - int(outputs[group.rank()].nbytes)


def _nothing(given: Arguments, group: Any) -> int:
    return 0


# By the name under torch.ops.c10d: the name of the collective here, and the bytes that a rank receives.
_COLLECTIVES: dict[str, tuple[str, Callable[[Arguments, Any], int]]] = {
    "allreduce_": ("all_reduce", _from_others("tensors", 2)),
    "allreduce_coalesced_": ("all_reduce", _from_others("tensors", 2)),
    "allgather_": ("all_gather", _from_others("output_tensors")),
    "_allgather_base_": ("all_gather", _from_others("output_tensor")),
    "allgather_coalesced_": ("all_gather", _from_others("output_lists")),
    "allgather_into_tensor_coalesced_": ("all_gather", _from_others("outputs")),
    "reduce_scatter_": ("reduce_scatter", _from_others("input_tensors")),
    "_reduce_scatter_base_": ("reduce_scatter", _from_others("input_tensor")),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _from_others("inputs")),
    "alltoall_base_": ("all_to_all", _exchanged),
    "alltoall_": ("all_to_all", _exchanged_lists),
    "broadcast_": ("broadcast", _if_root("tensors", False)),
    "reduce_": ("reduce", _if_root("tensors", True)),
    "gather_": ("gather", _gathered_on_root),
    "scatter_": ("scatter", _if_root("output_tensors", False)),
    "send": ("send", _nothing),
    "recv_": ("recv", lambda given, group: _num_bytes(given["tensors"])),
    "barrier": ("barrier", _nothing),
}


class PeakMemory(Meter):
    """Measures the most memory that the code inside holds at once, beyond what was allocated before.

    On CUDA the figures are the allocator's. Elsewhere tensors' storages are followed from the operator
    that returns them until they are freed; memory that an operator takes and frees within is not seen.

    Attributes:
        peak_bytes: the most bytes so far; on CUDA only after the meter is exited.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Make the meter.

        Args:
            device: where the tensors are.
        """
        self.peak_bytes = 0
        self._live_bytes = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        is_cuda = torch.device(device).type == "cuda"
        super().__init__([self._cuda_peak(device) if is_cuda else _OnOperators(self._on_operator)])

    def _on_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            key = storage._cdata
            if key not in given:
                _, replaced = self._made.get(key, (None, 0))  # of a storage that was freed
                self._made[key] = (StorageWeakRef(storage), storage.nbytes())
                self._live_bytes += storage.nbytes() - replaced
        if self._live_bytes > self.peak_bytes:  # unless some of it is gone
            sizes = {key: (ref, _size_of(ref)) for key, (ref, _) in self._made.items()}
            self._made = {key: entry for key, entry in sizes.items() if entry[1]}
            self._live_bytes = sum(size for _, size in self._made.values())
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    @contextlib.contextmanager
    def _cuda_peak(self, device: torch.device | str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        self.peak_bytes = torch.cuda.max_memory_allocated(device) - before


def _size_of(ref: StorageWeakRef) -> int:
    """Return the bytes of a storage; 0 when it is freed, or was emptied by ``resize_``."""
    storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return 0 if storage is None else int(storage.nbytes())


def _storages(values: Any) -> Iterable[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


class _OnOperators(TorchDispatchMode):
    """Reports every operator, its arguments and its result to ``see``."""

    def __init__(self, see: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._see(func, args, kwargs or {}, out)
        return out


class _OnFunctions(TorchFunctionMode):
    """Reports every call of torch's Python interface to ``see``, before it runs."""

    def __init__(self, see: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._see(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
