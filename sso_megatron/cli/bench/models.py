"""Lists the matrices of the paper's models (arXiv 2601.08393), at their size or scaled down."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sso_megatron.matrices.attention import Section, head_splits
from sso_megatron.matrices.layout import ParameterLayout, Split, gate_up_splits, whole

_HEAD_DIM = 128


@dataclass(frozen=True)
class Model:
    """Sizes of a model's matrices, without embeddings and output layer.

    Attributes:
        title: the model's name in the paper.
        layers: number of layers.
        hidden: hidden size.
        heads: attention heads, each of 128 rows at every hidden size.
        kv_heads: key and value heads, which is the number of query groups.
        ffn: rows of gate, and of up, of a dense layer.
        experts: routed experts of every layer but the first, which is dense; 0 where all are dense.
        expert_ffn: rows of gate, and of up, of a routed expert and of the shared one.
    """

    title: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    experts: int = 0
    expert_ffn: int = 0

    def scaled(self, hidden: int, layers: int) -> "Model":
        """Return the same model with another hidden size and depth.

        Heads and feed-forward sizes scale with the hidden size; the number of experts does not.

        Raises:
            ValueError: heads or layers would be no whole number, or too few.
        """
        unit = self.hidden // self.kv_heads
        if hidden < 1 or (hidden % unit and hidden != unit // 2):
            raise ValueError(
                f"--hidden {hidden} must be {unit // 2} or a multiple of {unit}: {self.title} has a query "
                f"group of {self.heads // self.kv_heads} heads for each {unit}"
            )
        least = 2 if self.experts else 1
        if layers < least:
            reason = f": the first layer of {self.title} has no experts" if self.experts else ""
            raise ValueError(f"--layers {layers} must be at least {least}{reason}")
        return replace(
            self,
            layers=layers,
            hidden=hidden,
            heads=self.heads * hidden // self.hidden,
            kv_heads=max(1, self.kv_heads * hidden // self.hidden),
            ffn=self.ffn * hidden // self.hidden,
            expert_ffn=self.expert_ffn * hidden // self.hidden,
        )

    def check_tp(self, tp_size: int) -> None:
        """Raise ValueError unless tensor parallelism can shard the model over ``tp_size`` ranks."""
        if tp_size < 1:
            raise ValueError(f"--tp {tp_size} must be at least 1")
        sizes = {"query groups": self.kv_heads, "feed-forward rows": self.ffn}
        if self.experts:
            sizes["rows of the shared expert"] = self.expert_ffn
        for what, size in sizes.items():
            if size % tp_size:
                raise ValueError(
                    f"--tp {tp_size} must divide the model's {size} {what}; "
                    "take fewer ranks or a larger --hidden"
                )


MODELS = {
    "dense-1.7b": Model("Dense 1.7B", 28, 2048, 16, 8, ffn=6144),
    "moe-8b-a1b": Model("MoE 8B-A1B", 27, 2048, 16, 8, ffn=4096, experts=64, expert_ffn=768),
    "deepnet-200": Model("DeepNet-200", 200, 512, 8, 4, ffn=1536),
}


@dataclass(frozen=True)
class Stored:
    """A parameter as Megatron stores it.

    Attributes:
        name: the parameter's name in the model.
        shape: global ``(rows, columns)``.
        partition_dim: dimension along which tensor parallelism shards, or None.
        kind: ``qkv`` and ``gate_up`` hold several matrices, ``one`` holds one.
    """

    name: str
    shape: tuple[int, int]
    partition_dim: int | None
    kind: str

    def local_shape(self, tp_size: int) -> tuple[int, int]:
        """Return the shape of a rank's shard."""
        rows, columns = self.shape
        if self.partition_dim is None:
            return self.shape
        return (rows, columns // tp_size) if self.partition_dim else (rows // tp_size, columns)


def stored_parameters(model: Model) -> Iterator[Stored]:
    """Yield every matrix parameter of a model, in order.

    Megatron's column-parallel layers are sharded along dimension 0 and its row-parallel ones along
    dimension 1. Neither the router nor the routed experts are sharded (expert tensor parallelism of 1).
    """
    heads, hidden = model.heads * _HEAD_DIM, model.hidden
    for number in range(model.layers):
        layer = f"layers.{number}"
        qkv_rows = heads + 2 * model.kv_heads * _HEAD_DIM
        yield Stored(f"{layer}.linear_qkv", (qkv_rows, hidden), 0, "qkv")
        yield Stored(f"{layer}.linear_proj", (hidden, heads), 1, "one")
        if number and model.experts:
            yield Stored(f"{layer}.router", (model.experts, hidden), None, "one")
            for expert in range(model.experts):
                yield from _mlp(f"{layer}.experts.{expert}", hidden, model.expert_ffn, is_cut=False)
            yield from _mlp(f"{layer}.shared_experts", hidden, model.expert_ffn, is_cut=True)
        else:
            yield from _mlp(f"{layer}.mlp", hidden, model.ffn, is_cut=True)


def _mlp(name: str, hidden: int, ffn: int, *, is_cut: bool) -> Iterator[Stored]:
    yield Stored(f"{name}.linear_fc1", (2 * ffn, hidden), 0 if is_cut else None, "gate_up")
    yield Stored(f"{name}.linear_fc2", (hidden, ffn), 1 if is_cut else None, "one")


def layout_of(
    stored: Stored, model: Model, *, is_split: bool, tp_size: int, tp_rank: int, tp_group: Any
) -> ParameterLayout:
    """Return the layout of a parameter: the matrices that it is taken as.

    Args:
        stored: the parameter.
        model: gives the heads.
        is_split: whether each attention head, and gate and up, are matrices by themselves; else the
            parameter is one matrix.
        tp_size: ranks of the tensor-parallel group.
        tp_rank: this rank's place in it.
        tp_group: the group; None for one rank.
    """
    shape, dim = stored.local_shape(tp_size), stored.partition_dim if tp_size > 1 else None
    splits: tuple[Split, ...] = (whole(shape, dim, tp_size),)
    if is_split and stored.kind == "qkv":
        per_group = model.heads // model.kv_heads
        sections = [Section(label, n, _HEAD_DIM) for label, n in (("q", per_group), ("k", 1), ("v", 1))]
        splits = head_splits(shape, sections=sections, granularity="head", tp_size=tp_size, tp_rank=tp_rank)
    elif is_split and stored.kind == "gate_up":
        splits = gate_up_splits(shape, dim, tp_size if dim == 0 else 1)
    return ParameterLayout(stored.name, splits, tp_group if dim is not None else None)
