"""Stable ranks of what comes into a model's weights, seen by hooks in the forward passes of one step."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sso_megatron.linalg.shard_view import ShardView
from sso_megatron.linalg.stable_rank import COLUMNS, StreamedRows, add_rows, squared_norms
from sso_megatron.mcore.parameters.layouts import ModelParameter
from sso_megatron.parallel.shards import sum_over


class InputStableRank:
    """Looks on from when it is made until ``stable_ranks``; nothing of the model changes.

    Incoming activations ``A`` have a row for each token of the step, padding included. For an embedding
    they are one-hot, and the stable rank is 1 by the share of the most frequent token. Of a weight that is
    used in several places, as a tied embedding, and of one in a fused kernel that hooks do not see, nothing
    is known.

    Activations that are recomputed in the backward pass are seen twice, which changes no stable rank.

    Collectives while it looks on: where the columns of ``A`` are cut, two sums a pass over the
    tensor-parallel group (``linalg.stable_rank.add_rows``).
    """

    def __init__(self, parameters: Sequence[ModelParameter], pg_collection: Any) -> None:
        """Hook into the modules of some weights.

        Args:
            parameters: 2-D weights.
            pg_collection: Megatron's process groups.
        """
        self._groups = pg_collection
        embeddings = [p for p in parameters if hasattr(p.module, "num_embeddings")]
        self._counts = {p.name: _zeros(p, p.module.num_embeddings, dtype=torch.int64) for p in embeddings}
        self._linear = {p.name: p for p in parameters if p.name not in self._counts}
        # Also of what nothing will come into here: ranks that share weights take part in the same sums.
        self._rows = {
            name: StreamedRows(_zeros(p, dtype=torch.float64)) for name, p in self._linear.items()
        }
        by_module: dict[Any, list[ModelParameter]] = {}
        for p in parameters:
            by_module.setdefault(p.module, []).append(p)
        self._hooks = [
            module.register_forward_pre_hook(self._hook(own), with_kwargs=True)
            for module, own in by_module.items()
        ]

    def close(self) -> None:
        """Look on no longer."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, own: list[ModelParameter]) -> Callable[..., None]:
        """For the module that some weights, sorted as it numbers them, belong to."""

        @torch.no_grad()
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first, *rest = [*args, *kwargs.values()]
            if own[0].name in self._counts:
                tokens = first.flatten()
                self._counts[own[0].name].scatter_add_(0, tokens, torch.ones_like(tokens))
                return
            rows = _normed(module, first).flatten(0, -2)
            # A grouped product gets the tokens of its experts one after the other, and their numbers.
            parts = rows.split(list(rest[0])) if own[0].is_grouped else [rows]
            for p, part in zip(own, parts, strict=True):
                add_rows(self._rows[p.name], part, _part(p))

        return hook

    def stable_ranks(self) -> dict[str, float]:
        """By name, of each weight that something has come into; waits for the device.

        Collectives: of embeddings one sum each; of other weights, for each width of activations and set of
        ranks that saw other tokens of the same weights, one sum and those of
        ``linalg.stable_rank.squared_norms``; one over the tensor-parallel group where columns are cut.
        """
        found: dict[str, float] = {}
        for name, counts in self._counts.items():
            counts = _summed(counts, self._groups.dp_cp)
            found[name] = (counts.sum() / counts.max()).item()
        alike: dict[Any, list[ModelParameter]] = {}
        for p in self._linear.values():
            alike.setdefault((self._replicas(p), p.partition_dim == 1, _width(p)), []).append(p)
        for (group, is_cut, width), some in alike.items():
            rows = [self._rows[p.name] for p in some]
            squares = _summed(torch.stack([one.square for one in rows]), group)
            if is_cut:
                squares = _summed(squares, some[0].tp_group)
            nothing = _zeros(some[0], width, min(width, COLUMNS))
            blocks = torch.stack([nothing if one.block is None else one.block for one in rows])
            ranks = squares / squared_norms(blocks, sum_over(group))
            found |= {p.name: rank for p, rank in zip(some, ranks.tolist(), strict=True)}
        return {name: rank for name, rank in found.items() if math.isfinite(rank)}

    def _replicas(self, p: ModelParameter) -> Any:
        """The ranks that may have seen other tokens: equal ones that count several times do not matter."""
        if p.is_expert:
            return self._groups.expt_dp
        return self._groups.dp_cp if p.partition_dim == 1 else self._groups.tp_dp_cp


def _zeros(p: ModelParameter, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=p.param.device)


def _summed(x: Tensor, group: Any) -> Tensor:
    all_reduce = sum_over(group)
    return x if all_reduce is None else all_reduce(x)


def _width(p: ModelParameter) -> int:
    """Of the activations that come into a weight, over all ranks."""
    return p.param.size(-1) * (p.tp_size if p.partition_dim == 1 else 1)


def _part(p: ModelParameter) -> ShardView:
    """Which columns of the activations come into this rank's shard."""
    if p.partition_dim != 1:
        return ShardView((0, _width(p)))
    return ShardView((0, _width(p)), sum_over(p.tp_group), p.tp_rank * p.param.size(-1))


def _normed(module: Any, x: Tensor) -> Tensor:
    """What a layer that norms its input itself, as TransformerEngine's does, multiplies its weight by."""
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return x
    x, weight = x.float(), weight.float() + (1 if module.zero_centered_gamma else 0)
    if module.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(x, weight.shape, weight, module.eps)
    return torch.nn.functional.layer_norm(
        x, weight.shape, weight, module.layer_norm_bias.float(), module.eps
    )
