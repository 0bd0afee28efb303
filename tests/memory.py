"""How much memory a piece of code takes beside what was there before."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Bytes of tensors that were made inside and were alive at a time; ``peak`` is the most."""

    def __enter__(self) -> "PeakMemory":
        self.peak = self._bytes = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in tensors(result)):
            if storage._cdata not in given:
                _, replaced = self._made.get(storage._cdata, (None, 0))
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._bytes += storage.nbytes() - replaced
        if self._bytes > self.peak:  # unless some of it is gone
            self._made = {key: (ref, size_of(ref)) for key, (ref, _) in self._made.items() if size_of(ref)}
            self._bytes = sum(nbytes for _, nbytes in self._made.values())
            self.peak = max(self.peak, self._bytes)
        return result


def size_of(ref: StorageWeakRef) -> int:
    """Bytes of a storage, 0 when it is gone or was emptied."""
    storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return 0 if storage is None else storage.nbytes()


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
