"""Stable ranks of the activations that come into weights, measured by forward hooks in one step."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sso_megatron.linalg.norms.stable_rank import COLUMNS, StreamedRows, add_rows, squared_norms
from sso_megatron.linalg.shard_view import ShardView
from sso_megatron.mcore.parameters.layouts import ModelParameter
from sso_megatron.parallel.shards import all_reduce, sum_over


class InputStableRank:
    """Measures stable ranks from its construction until ``close``, and changes nothing in the model.

    Incoming activations ``A`` have a row for each token of the step, padding included. For an embedding
    they are one-hot, and the stable rank is 1 over the share of the most frequent token. A weight in a
    fused kernel that hooks do not see has no stable rank.

    Hooks see activations that are recomputed in the backward pass twice, which changes no stable rank.

    Collectives in forward passes: where the columns of ``A`` are sharded, those of
    ``linalg.norms.stable_rank.add_rows`` over the tensor-parallel group.
    """

    def __init__(self, parameters: Sequence[ModelParameter], pg_collection: Any) -> None:
        """Hook into the modules of some weights.

        Args:
            parameters: 2-D weights, each used in one place of the model.
            pg_collection: Megatron's process groups.
        """
        self._groups = pg_collection
        embeddings = [p for p in parameters if hasattr(p.module, "num_embeddings")]
        self._counts = {p.name: _zeros(p, p.module.num_embeddings, dtype=torch.int64) for p in embeddings}
        self._linear = {p.name: p for p in parameters if p.name not in self._counts}
        # Weights whose input this rank never sees are included: ranks that share one issue the same sums.
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
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, own: list[ModelParameter]) -> Callable[..., None]:
        """Return the hook for the module of the weights ``own``, which are in the module's order."""

        @torch.no_grad()
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first, *rest = [*args, *kwargs.values()]
            if own[0].name in self._counts:
                tokens = first.flatten()
                self._counts[own[0].name].scatter_add_(0, tokens, torch.ones_like(tokens))
                return
            rows = _normed(module, first).flatten(0, -2)
            # A grouped product gets the tokens of its experts one after the other, and how many each has.
            parts = rows.split(list(rest[0])) if own[0].is_grouped else [rows]
            for p, part in zip(own, parts, strict=True):
                add_rows(self._rows[p.name], part, _part(p))

        return hook

    def stable_ranks(self) -> dict[str, float]:
        """Return stable ranks by name of the weights that have had input; waits for the device.

        Collectives: one all-reduce for each embedding. Other weights are batched by the width of their
        activations and by the group of ranks that saw other tokens; each batch takes one all-reduce and
        those of ``linalg.norms.stable_rank.squared_norms`` over that group, and where columns are sharded
        one more over the tensor-parallel group.
        """
        found: dict[str, float] = {}
        for name, counts in self._counts.items():
            counts = all_reduce(counts, self._groups.dp_cp)
            found[name] = (counts.sum() / counts.max()).item()
        alike: dict[Any, list[ModelParameter]] = {}
        for p in self._linear.values():
            alike.setdefault((self._replicas(p), p.partition_dim == 1, _width(p)), []).append(p)
        for (group, is_cut, width), some in alike.items():
            rows = [self._rows[p.name] for p in some]
            squares = all_reduce(torch.stack([one.square for one in rows]), group)
            if is_cut:
                squares = all_reduce(squares, some[0].tp_group)
            nothing = _zeros(some[0], width, min(width, COLUMNS))
            blocks = torch.stack([nothing if one.block is None else one.block for one in rows])
            ranks = squares / squared_norms(blocks, sum_over(group))
            found |= {p.name: rank for p, rank in zip(some, ranks.tolist(), strict=True)}
        return {name: rank for name, rank in found.items() if math.isfinite(rank)}

    def _replicas(self, p: ModelParameter) -> Any:
        """Return the ranks that may have seen other tokens.

        A token that several ranks count changes no stable rank.
        """
        if p.is_expert:
            return self._groups.expt_dp
        return self._groups.dp_cp if p.partition_dim == 1 else self._groups.tp_dp_cp


def _zeros(p: ModelParameter, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=p.param.device)


def _width(p: ModelParameter) -> int:
    """Return the width of the activations that come into a weight, over all ranks."""
    return p.param.size(-1) * (p.tp_size if p.partition_dim == 1 else 1)


def _part(p: ModelParameter) -> ShardView:
    """Return the view of the activations' columns that come into this rank's shard of a weight."""
    if p.partition_dim != 1:
        return ShardView((0, _width(p)))
    return ShardView((0, _width(p)), sum_over(p.tp_group), p.tp_rank * p.param.size(-1))


def _normed(module: Any, x: Tensor) -> Tensor:
    """Return a layer's input as it is multiplied: some TransformerEngine layers normalize it first."""
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return x
    x, weight = x.float(), weight.float() + (1 if module.zero_centered_gamma else 0)
    if module.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(x, weight.shape, weight, module.eps)
    return torch.nn.functional.layer_norm(
        x, weight.shape, weight, module.layer_norm_bias.float(), module.eps
    )
