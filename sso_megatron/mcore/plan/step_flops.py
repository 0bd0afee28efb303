"""Counts the flops of a spectral step by running the optimizer's own step on the meta device."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sso_megatron.matrices.layout import ParameterLayout, Split, whole
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.parallel.shards import Cut


class StepFlops:
    """Counts the flops of a warm step with torch's ``FlopCounterMode``, which counts matrix products alone.

    With bisection the number of trials depends on values; the published mean is assumed.
    """

    def __init__(
        self, optimizer_cls: type[SpectralOptimizer], settings: dict[str, Any], known: dict[Any, float]
    ) -> None:
        """Take the optimizer's class and settings, and known counts; new counts are added to them."""
        self._cls, self._settings, self._known = optimizer_cls, settings, known
        config = settings["config"]
        self._bisects = getattr(config, "solver", "") == "bisection" and config.tangent == "solve"

    def whole(self, shape: tuple[int, int]) -> float:
        """Return the flops of a step on one whole matrix."""
        if shape not in self._known:
            self._known[shape] = self._count(shape, whole(shape), None)
        return self._known[shape]

    def shard(self, cut: Cut, tp_group: Any) -> float:
        """Return the flops of one rank in a step on a matrix whose shards stay on their ranks."""
        if cut not in self._known:
            stored = cut.shard_shape(0)
            lengths = cut.lengths if cut.dim == 0 else None
            split = Split("", ((0, stored[0]),), cut.shape, cut.dim, lengths)
            self._known[cut] = self._count(stored, split, tp_group)
        return self._known[cut]

    def _count(self, stored: tuple[int, int], split: Split, tp_group: Any) -> float:
        layout = ParameterLayout("matrix", (split,), tp_group)
        param = torch.empty(stored, device="meta", requires_grad=True)
        settings = self._settings | {
            "shared": SpectralConfig(tp_mode="auto" if split.partition_dim is None else "distributed"),
            "find_layout": lambda _: layout,
        }
        optimizer = self._cls([param], **settings)
        if self._bisects:
            if split.partition_dim is None:
                return optimizer.polar_work().flops(split.shape)
            size = tp_group.size()
            return optimizer.polar_work().gram_flops(split.shape, split.partition_dim, size)
        param.grad = torch.zeros_like(param)
        state = optimizer.warm_state(split.shape)
        with _AnyValues():
            if state:
                optimizer.load_spectral_state({"matrix": state})
            else:
                optimizer.step()  # finds the state that later steps start from
            with FlopCounterMode(display=False) as counter:
                optimizer.step()
        return float(counter.get_total_flops())


class _AnyValues(TorchFunctionMode):
    """Returns 1 or True where a first step reads a value, which a tensor on the meta device has not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        looks = func in (torch.Tensor.tolist, torch.Tensor.__bool__)
        if looks and isinstance(args[0], Tensor) and args[0].is_meta:
            return True if func is torch.Tensor.__bool__ else [1.0] * args[0].numel()
        return func(*args, **(kwargs or {}))
