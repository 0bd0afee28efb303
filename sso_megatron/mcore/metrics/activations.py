"""Sizes of activations, attention logits and expert loads of one step, measured by forward hooks."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sso_megatron.mcore.metrics.rank_gather import Contribution
from sso_megatron.mcore.parameters.names import global_names
from sso_megatron.runs.tables import ACTIVATIONS, Table

_SUMS = tuple(f"{place}_{what}" for place in ACTIVATIONS for what in ("square", "count"))
_MAXIMA = (*(f"{place}_max" for place in ACTIVATIONS), "logit_max")
_LAYER = re.compile(r"(^|\.)layers\.\d+$")


class ActivationMeter:
    """Measures between ``start`` and ``finish``, and changes nothing in the model. No collective.

    The output of a layer is its residual stream. Hooks see recomputed activations twice, which changes none
    of the results. Attention logits are the input of the softmax in Megatron's local attention, or with
    ``--log-max-attention-logit`` or ``--qk-clip`` the maximum that TransformerEngine's kernel reports.
    After an evaluation that maximum covers the evaluation, too.
    """

    def __init__(self, model_chunks: Sequence[Any], groups: Any, device: torch.device) -> None:
        """Find the layers of a model.

        Args:
            model_chunks: Megatron modules, wrapped in DDP or not.
            groups: Megatron's process groups.
            device: where the model's activations are.
        """
        from megatron.core.utils import get_model_config

        self._device = device
        self._modules: dict[str, dict[str, Any]] = {}
        self._num_experts = get_model_config(model_chunks[0]).num_moe_experts or 0
        for chunk in model_chunks:
            first = groups.ep.rank() * (self._num_experts // groups.ep.size())
            rename, modules = global_names(chunk, first), dict(chunk.named_modules())
            for name, module in modules.items():
                if _LAYER.search(name):
                    self._modules.setdefault(rename(name), {})["residual"] = module
                    continue
                layer = _layer_around(name)
                if layer is not None:
                    kind = _kind(name[len(layer) + 1 :], module)
                    if kind:
                        self._modules.setdefault(rename(layer), {})[kind] = module
        self._rows = list(self._modules)
        self._routed = [row for row in self._rows if "router" in self._modules[row]]

    @property
    def contributions(self) -> dict[str, Contribution]:
        """The rows that this rank reports: each of its layers, measured over this rank's tokens."""
        rank = dist.get_rank()
        loads = tuple(f"load{expert}" for expert in range(self._num_experts))
        return {
            "layers": Contribution([(row, rank) for row in self._rows], _SUMS, _MAXIMA),
            "experts": Contribution([(row, rank) for row in self._routed], loads),
        }

    def start(self) -> None:
        """Hook into the modules."""
        device, num_layers = self._device, len(self._rows)
        self._squares = torch.zeros(num_layers, len(ACTIVATIONS), dtype=torch.float64, device=device)
        self._counts = torch.zeros_like(self._squares)
        self._maxima = torch.zeros(num_layers, len(_MAXIMA), device=device)
        self._maxima[:, -1] = -torch.inf
        self._loads = torch.zeros(len(self._routed), self._num_experts, device=device)
        self._undo: list[Callable[[], None]] = []
        for place, row in enumerate(self._rows):
            for kind, module in self._modules[row].items():
                if kind == "softmax":
                    self._look_at_logits(module, place)
                    continue
                where = self._routed.index(row) if kind == "router" else place
                self._undo.append(module.register_forward_hook(_at(self._hook(kind), where)).remove)

    def finish(self) -> dict[str, Tensor]:
        """Remove the hooks and return the numbers for ``contributions``, NaN turned into infinity."""
        for undo in self._undo:
            undo()
        sums = torch.stack([self._squares, self._counts], dim=2).flatten(1).float()
        both = torch.cat([sums, self._maxima], dim=1)
        layers = torch.where(both.isnan(), torch.inf, both)
        return {"layers": layers, "experts": self._loads}

    def _hook(self, kind: str) -> Callable[[int, Any, Any], None]:
        others = {"router": self._count_tokens, "core_attention": self._take_kernel_logits}
        return others[kind] if kind in others else self._measure(ACTIVATIONS.index(kind))

    def _measure(self, kind: int) -> Callable[[int, Any, Any], None]:
        def measure(place: int, module: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            if not isinstance(x, Tensor):
                return
            norm = torch.linalg.vector_norm(x, dtype=torch.float32)
            self._squares[place, kind] += norm.double().square()
            self._counts[place, kind] += x.numel()
            largest = torch.linalg.vector_norm(x, ord=torch.inf).float()
            self._maxima[place, kind] = torch.maximum(self._maxima[place, kind], largest)

        return measure

    def _look_at_logits(self, softmax: Any, place: int) -> None:
        """Note the scores that the local attention's mask lets through."""
        original = softmax.mask_func

        def masked(scores: Tensor, mask: Tensor) -> Tensor:
            result: Tensor = original(scores, mask)
            self._note_logit(place, result.detach().amax())
            return result

        def restore() -> None:
            softmax.mask_func = original

        softmax.mask_func = masked
        self._undo.append(restore)

    def _take_kernel_logits(self, place: int, module: Any, output: Any) -> None:
        logits = getattr(module, "current_max_attn_logits", None)
        if logits is not None:
            self._note_logit(place, logits.detach().amax())

    def _note_logit(self, place: int, largest: Tensor) -> None:
        self._maxima[place, -1] = torch.maximum(self._maxima[place, -1], largest.float())

    def _count_tokens(self, place: int, module: Any, output: Any) -> None:
        routing_map = output[1]
        if routing_map is not None and routing_map.shape[-1] == self._num_experts:
            self._loads[place] += routing_map.flatten(0, -2).sum(dim=0)


def why_hidden(options: Any) -> str | None:
    """Return the reason why hooks do not see forward passes; None if they do.

    Args:
        options: Megatron's arguments.
    """
    if getattr(options, "cuda_graph_impl", "none") != "none":
        return f"a replayed forward pass cannot be looked at (--cuda-graph-impl {options.cuda_graph_impl})"
    if options.overlap_moe_expert_parallel_comm:
        return "layers are called in parts (--overlap-moe-expert-parallel-comm)"
    return None


def _layer_around(name: str) -> str | None:
    """Return the name of the innermost layer around a module; None if there is none."""
    parts = name.split(".")
    for stop in range(len(parts) - 1, 1, -1):
        if parts[stop - 1].isdigit() and parts[stop - 2] == "layers":
            return ".".join(parts[:stop])
    return None


def _kind(within: str, module: Any) -> str | None:
    """Return what a hook measures at a module, by its name within the layer; None for nothing."""
    if type(module).__name__ == "IdentityOp":  # all modules but one in a hybrid model's layer
        return None
    within = within.removeprefix("mtp_model_layer.")
    if within in ("self_attention", "mlp"):
        return within.removeprefix("self_")
    if within == "mlp.router":
        return "router"
    if within == "self_attention.core_attention.scale_mask_softmax":
        return "softmax"
    if within == "self_attention.core_attention" and not hasattr(module, "scale_mask_softmax"):
        return "core_attention"
    return None


def _at(hook: Callable[[int, Any, Any], None], place: int) -> Callable[[Any, Any, Any], None]:
    @torch.no_grad()
    def forward_hook(module: Any, inputs: Any, output: Any) -> None:
        hook(place, module, output)

    return forward_hook


def layer_table(reduced: tuple[tuple[str, ...], dict[str, np.ndarray]]) -> Table:
    """Return the table ``layers``: root mean squares and largest magnitudes, NaN where no hook ran."""
    rows, sums = reduced
    columns = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for place in ACTIVATIONS:
            count = sums[f"{place}_count"]
            columns[f"{place}_rms"] = np.where(count > 0, np.sqrt(sums[f"{place}_square"] / count), np.nan)
            columns[f"{place}_max"] = np.where(count > 0, sums[f"{place}_max"], np.nan)
    logits = sums["logit_max"]
    return Table(rows, columns | {"logit_max": np.where(np.isneginf(logits), np.nan, logits)})


def expert_table(reduced: tuple[tuple[str, ...], dict[str, np.ndarray]]) -> Table:
    """Return the table ``experts``: ``load``, tokens over their mean; ``max_vio``, largest load minus 1."""
    rows, loads = reduced
    tokens = np.stack(list(loads.values()), axis=1) if loads else np.zeros((0, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        load = tokens / tokens.mean(axis=1, keepdims=True) if tokens.size else tokens
    max_vio = load.max(axis=1) - 1 if load.size else np.zeros(0)
    return Table(rows, {"max_vio": max_vio, "load": load})
