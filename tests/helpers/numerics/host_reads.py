"""A mode in which nothing may be read from the device."""

from typing import Any

from torch.overrides import TorchFunctionMode


class NoHostReads(TorchFunctionMode):
    """Raises where Python asks a tensor for a number, or for a shape that depends on its numbers."""

    READS = frozenset(
        (
            *("item", "tolist", "numpy", "nonzero", "argwhere", "masked_select", "unique", "cpu", "equal"),
            *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__"),
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.READS or (name == "where" and len(args) == 1):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))
