"""Functions that a rank runs beside training, to look at the sharded optimizer by value."""

import functools
import itertools
import os
import runpy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from helpers.paths import SCRIPTS
from helpers.probes import around_train, save, spectral_optimizers


def steps() -> None:
    """Save what every optimizer step returned, and the loss scale."""
    seen: list[dict[str, Any]] = []

    def watch(model: Any, optimizer: Any) -> None:
        step = optimizer.step

        @functools.wraps(step)
        def watched() -> Any:
            success, grad_norm, zeros = step()
            scale = optimizer.get_loss_scale().item()
            seen.append({"success": success, "grad_norm": grad_norm, "zeros": zeros, "scale": scale})
            return success, grad_norm, zeros

        optimizer.step = watched

    around_train(watch, lambda model, optimizer: save("steps", seen))


def shards() -> None:
    """Save this rank's place, the logical matrices that it steps on, and its model after training."""
    from megatron.core import parallel_state as mpu

    from sso_megatron.mcore.optimizer.buffer_layout import is_expert_parallel

    def look(model: Any, optimizer: Any) -> None:
        place = {
            "tp": mpu.get_tensor_model_parallel_rank(),
            "pp": mpu.get_pipeline_model_parallel_rank(),
            "dp": mpu.get_data_parallel_rank(),
            "ep": mpu.get_expert_model_parallel_rank(),
            "etp": mpu.get_expert_tensor_parallel_rank(),
            "edp": mpu.get_expert_data_parallel_rank(),
        }
        members = [m for o in spectral_optimizers(optimizer) for batch in o.batches for m in batch.members]
        save("place", place)
        save("owned", {m.name: is_expert_parallel(m.param) for m in members})

    def copy(model: Any, optimizer: Any) -> None:
        for chunk in model:
            if chunk.remove_forward_pre_hook_handles:  # with overlap the next forward pass would gather
                chunk.start_param_sync(force_sync=True)
        save("model", _parameters(model))

    around_train(look, copy)


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    named = [(i, name, p) for i, chunk in enumerate(model) for name, p in chunk.named_parameters()]
    return {f"{i}.{name.replace('module.', '')}": p.detach().clone() for i, name, p in named}


def buffers() -> None:
    """Save how gradients are reduced and parameters gathered: elements by collective and kind of buffer."""
    from megatron.core.distributed import param_and_grad_buffer as module

    kinds: dict[int, tuple[str, str]] = {}  # by the address of a buffer
    counted: dict[tuple[str, str, str], int] = {}

    def counting(collective: str, original: Callable[..., Any], position: int) -> Callable[..., Any]:
        @functools.wraps(original)
        def counts(*args: Any, **kwargs: Any) -> Any:
            tensor = args[position]
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in kinds:
                what = (collective, *kinds[tensor.untyped_storage().data_ptr()])
                counted[what] = counted.get(what, 0) + tensor.numel()
            return original(*args, **kwargs)

        return counts

    def watch(model: Any, optimizer: Any) -> None:
        for chunk in model:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                whole = getattr(buffer.params[0], "is_managed_by_layer_wise_optimizer", False)
                whose = ("experts' " if buffer in chunk.expert_parallel_buffers else "") + (
                    "matrices" if whole else "others"
                )
                for what, data in (("gradients", buffer.grad_data), ("parameters", buffer.param_data)):
                    if data is not None:
                        kinds[data.untyped_storage().data_ptr()] = (what, whose)
        module.dist_reduce_scatter_func = counting("reduce_scatter", module.dist_reduce_scatter_func, 1)
        module.dist_all_gather_func = counting("all_gather", module.dist_all_gather_func, 0)
        early = torch.distributed.all_gather_into_tensor
        torch.distributed.all_gather_into_tensor = counting("all_gather", early, 0)
        torch.distributed.all_reduce = counting("all_reduce", torch.distributed.all_reduce, 0)

    around_train(watch, lambda model, optimizer: save("collectives", counted))


def gather_late() -> None:
    """Have every step gather as the first one does."""
    from sso_megatron.mcore.optimizer import layer_wise

    layer_wise._gathers_quantized = lambda chunk: True


def gathers() -> None:
    """Save what each optimizer step did, in order: gathers with their ends, batches, the step's end."""
    from sso_megatron.optimizers.base import SpectralOptimizer
    from sso_megatron.optimizers.sso import SSO

    labels: dict[tuple[int, int], str] = {}  # by address and size
    steps: list[list[str]] = [[]]  # what came before the first

    def watch(model: Any, optimizer: Any) -> None:
        for i, chunk in enumerate(model):
            for whose, buffers in (("dense", chunk.buffers), ("experts", chunk.expert_parallel_buffers)):
                for buffer in buffers:
                    whole = getattr(buffer.params[0], "is_managed_by_layer_wise_optimizer", False)
                    for bucket in buffer.buckets:
                        what = "matrices" if whole else "others"
                        label = f"gather {i} {whose} {what} {bucket.bucket_id}"
                        labels[bucket.param_data.data_ptr(), bucket.param_data.numel()] = label
        step = optimizer.step

        @functools.wraps(step)
        def watched() -> Any:
            steps.append([])
            return step()

        optimizer.step = watched

    def noting(original: Callable[..., Any], event: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            steps[-1].append(event)
            return result

        return noted

    gather = torch.distributed.all_gather_into_tensor

    @functools.wraps(gather)
    def noted_gather(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        work = gather(output, *args, **kwargs)
        label = labels.get((output.data_ptr(), output.numel()))
        if label is None:
            return work
        steps[-1].append(label)
        return SimpleNamespace(wait=noting(work.wait, "end of " + label))

    torch.distributed.all_gather_into_tensor = noted_gather
    SSO.update_batch_ = noting(SSO.update_batch_, "batch")
    SpectralOptimizer.step = noting(SpectralOptimizer.step, "stepped")
    around_train(watch, lambda model, optimizer: save("gathers", steps[1:]))


def fail_in_a_step() -> None:
    """Raise on the last rank in the third step, after the batch with which the first bucket is finished."""
    from sso_megatron.mcore.optimizer.param_gather import ParamGather

    step, take, count = ParamGather.step, ParamGather._take, itertools.count(1)
    state = {"gathers": 0}

    def counted(self: Any) -> None:
        state["gathers"] = next(count)
        step(self)

    def failing(self: Any, written: list[torch.Tensor]) -> None:
        take(self, written)
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        # The first step of a run has no early gathers, so this is the third one's.
        if state["gathers"] == 2 and is_last and len(self._handles) > 1:
            raise RuntimeError("out of something")

    ParamGather.step, ParamGather._take = counted, failing


def groups() -> None:
    """Save each parameter's settings by name, and its value before and after training."""

    def look(model: Any, optimizer: Any) -> None:
        names = {id(p): n.replace("module.", "") for c in model for n, p in c.named_parameters()}
        found = {}
        for part in _leaves(optimizer):
            for i, group in enumerate(part.optimizer.param_groups):
                settings = {k: v for k, v in group.items() if k != "params"} | {
                    "class": type(part.optimizer)
                }
                found |= {names[id(param)]: settings for param in _model_parameters(part, i)}
        save("groups", found)
        save("before", _parameters(model))

    around_train(look, lambda model, optimizer: save("after", _parameters(model)))


def _leaves(optimizer: Any) -> list[Any]:
    if hasattr(optimizer, "chained_optimizers"):
        return [leaf for part in optimizer.chained_optimizers for leaf in _leaves(part)]
    return [optimizer]


def _model_parameters(part: Any, group: int) -> list[Any]:
    """The model's parameters behind a group, which holds shards of them for DistributedOptimizer."""
    if hasattr(part, "model_fp32_groups"):
        return part.model_fp32_groups[group]
    return part.optimizer.param_groups[group]["params"]


def freeze_matrices() -> None:
    """Freeze the first layer's MLP and the second layer's QKV."""

    def freeze(layer: Any) -> None:
        part = layer.mlp if layer.layer_number == 1 else layer.self_attention.linear_qkv
        part.requires_grad_(False)

    _freeze(freeze)


def freeze_input_norms() -> None:
    """Freeze what is AdamW's first in a layer: a model chunk's first parameter is then a matrix."""
    _freeze(lambda layer: layer.input_layernorm.requires_grad_(False))


def freeze_last_layer() -> None:
    """Freeze the second layer: under PP 2 the last stage has no matrix to train."""
    _freeze(lambda layer: layer.layer_number == 2 and layer.requires_grad_(False))


def _freeze(freeze: Callable[[Any], object]) -> None:
    from megatron.training.models import gpt

    original = gpt.unimodal_build_distributed_models

    @functools.wraps(original)
    def build(build_model: Any, *args: Any, **kwargs: Any) -> Any:
        def build_frozen(*a: Any, **k: Any) -> Any:
            model = build_model(*a, **k)
            for layer in model.decoder.layers:
                freeze(layer)
            return model

        return original(build_frozen, *args, **kwargs)

    gpt.unimodal_build_distributed_models = build


def do_not_route() -> None:
    """Build the model as if nobody had told Megatron of our rule."""
    from sso_megatron.mcore.optimizer import model_hooks

    model_hooks.install = lambda: None


def their_script() -> None:
    """A user's script, whose model comes from a provider of its own."""
    runpy.run_path(str(SCRIPTS / "their_pretrain.py"), run_name="__main__")


# Global shapes of the logical matrices that a parameter holds, with its own shape, in a layer's order.
_Layer = list[tuple[tuple[int, int], list[tuple[int, int]]]]


def _attention(hidden: int, heads: int, groups: int, head: int) -> _Layer:
    rows = heads + 2 * groups
    return [
        ((hidden, heads * head), [(hidden, heads * head)]),
        ((rows * head, hidden), [(head, hidden)] * rows),
    ]


def _mlp(hidden: int, ffn: int) -> _Layer:
    return [((2 * ffn, hidden), [(ffn, hidden)] * 2), ((hidden, ffn), [(hidden, ffn)])]


MODELS = {
    "dense": (_attention(4096, 32, 8, 128) + _mlp(4096, 14336)) * 32,  # Llama 3 8B
    "moe": (_attention(2048, 32, 4, 128) + _mlp(2048, 768) * 16) * 48,  # Qwen3 30B-A3B at EP 8
}


def balance() -> None:
    """Save buffers of real models, laid out by Megatron and by us: places, buckets and cost by rank."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    from sso_megatron.mcore.optimizer.buffer_layout import ShardLayout
    from sso_megatron.parallel.cost import PolarWork

    found = {}
    for model, layers in MODELS.items():
        params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape, _ in layers]
        work = PolarWork(1, 1)
        costs = {p: sum(map(work.flops, parts)) for p, (_, parts) in zip(params, layers, strict=True)}
        for num_shards in (2, 8, 64):
            for bucket_size in (None, 40_000_000):
                args = (params, bucket_size, num_shards, DistributedDataParallelConfig())
                layouts = {
                    "theirs": LayerWiseDistributedOptimizer._compute_per_buffer_param_layout(*args),
                    "ours": ShardLayout(costs).per_buffer(*args),
                }
                for who, layout in layouts.items():
                    found[model, num_shards, bucket_size, who] = _summary(layout, params, costs, num_shards)
    save("balance", found)


def _summary(layout: Any, params: Any, costs: Any, num_shards: int) -> dict[str, Any]:
    cost = [0.0] * num_shards
    places = []
    for param in params:
        start, end, bucket = layout.param_index_map[param]
        first, last = layout.bucket_indices[bucket]
        size = (last - first) // num_shards
        shard = (start - first) // size
        cost[shard] += costs[param]
        places.append((start, end, bucket, first + shard * size, first + (shard + 1) * size))
    return {
        "places": places,
        "buckets": layout.bucket_indices,
        "unpadded": layout.per_bucket_numel_unpadded,
        "shards": layout.num_optimizer_shards,
        "cost": max(cost) / (sum(cost) / num_shards),
        "numels": [p.numel() for p in params],
    }
