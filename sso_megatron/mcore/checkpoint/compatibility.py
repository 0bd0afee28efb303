"""Whether a checkpoint fits the run that loads it, said before Megatron loads it.

Each function returns what is wrong in one line, or None. None of them issues a collective.
"""

from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sso_megatron.mcore.compat import private_api
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS
from sso_megatron.mcore.parameters.names import OPTIONAL_STATE

_SHOWN = 3
"""How many keys a message names."""

_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "max_position_embeddings", "vocab_size", "num_experts", "moe_ffn_hidden_size"),
    *("moe_shared_expert_intermediate_size", "mtp_num_layers", "swiglu", "qk_layernorm"),
    *("untie_embeddings_and_output_weights", "normalization", "hybrid_layer_pattern"),
)
"""Arguments of Megatron's that shapes and names of weights follow from."""

_ASSERTED = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
"""Those that must agree even where all shapes do. Megatron compares the first three itself, once all is
loaded; of another vocabulary it loads what overlaps."""


def stored_contents(folder: Path) -> Mapping[str, Any]:
    """The entries of a torch_dist checkpoint by key; a tensor's entry has its global shape as ``size``."""
    read = private_api.existing("megatron.core.dist_checkpointing.strategies.torch:_get_filesystem_reader")
    contents: Mapping[str, Any] = read(folder).read_metadata().state_dict_metadata
    return contents


# ---------------------------------------------------------------- kinds of optimizers


def wrong_optimizer(folder: Path, saved: Any, args: Namespace) -> str | None:
    """Whether optimizer state that is about to be loaded is that of another kind of optimizer.

    Args:
        folder: the checkpoint.
        saved: the arguments that it was saved with.
        args: this run's.
    """
    name = getattr(saved, "optimizer", None)
    if name is None or getattr(saved, "no_save_optim", False) or _kind(name) == _kind(args.optimizer):
        return None
    if not {name, args.optimizer} & OPTIMIZERS.keys():
        return None  # nothing of ours
    return (
        f"{folder} was saved with --optimizer {name}; its optimizer state cannot be loaded into "
        f"--optimizer {args.optimizer}: add --no-load-optim to keep iteration and weights and start the "
        "optimizer and its learning rate schedule anew"
    )


def _kind(name: str) -> Any:
    """What must be equal for the state of one to mean the same in the other."""
    spec = OPTIMIZERS.get(name)
    return (spec.prefix, spec.fixed) if spec else name


# ---------------------------------------------------------------- keys and shapes


def drop_missing_optional(tree: Any, stored: Collection[str]) -> None:
    """Take out of a sharded state dict, in place, what may be missing and is missing.

    That is every object whose key begins with ``OPTIONAL_STATE``; the optimizer finds it again.

    Args:
        tree: nested dictionaries and lists.
        stored: keys in the checkpoint.
    """
    if isinstance(tree, dict):
        for name in [n for n, entry in tree.items() if _may_be_dropped(entry, stored)]:
            del tree[name]
    elif isinstance(tree, list):
        tree[:] = [entry for entry in tree if not _may_be_dropped(entry, stored)]
    else:
        return
    for entry in tree.values() if isinstance(tree, dict) else tree:
        drop_missing_optional(entry, stored)


def _may_be_dropped(entry: Any, stored: Collection[str]) -> bool:
    from megatron.core.dist_checkpointing import ShardedObject

    is_optional = isinstance(entry, ShardedObject) and entry.key.startswith(OPTIONAL_STATE)
    return is_optional and entry.unique_key not in stored


def wrong_contents(
    folder: Path, wanted: Any, stored: Mapping[str, Any], saved: Any, args: Namespace
) -> str | None:
    """Whether a checkpoint lacks what is to be loaded, or holds it in another shape.

    Args:
        folder: the checkpoint.
        wanted: this rank's sharded state dict, which is left as it is.
        stored: from ``stored_contents``.
        saved: the arguments that it was saved with.
        args: this run's.
    """
    missing, misfits = [], []
    for key, unique_key, shape, may_differ in _entries(wanted):
        if unique_key not in stored:
            missing.append(key)
        elif shape is not None and not may_differ and tuple(stored[unique_key].size) != shape:
            misfits.append(f"{key} is {tuple(stored[unique_key].size)} in it and {shape} in this run")
    if misfits:
        return f"{folder} does not fit: {_some(misfits)}; {_what_to_do(misfits, saved, args)}"
    # The other ways to be strict let Megatron go on without a key, or name it themselves.
    if missing and args.dist_ckpt_strictness in ("assume_ok_unexpected", "raise_unexpected"):
        return f"{folder} does not hold {_some(missing)}; {_what_to_do(missing, saved, args)}"
    if args.finetune or _is_hybrid(saved) != _is_hybrid(args):
        return None
    if any(
        None not in (getattr(saved, n), getattr(args, n)) for n in _changed(saved, args) if n in _ASSERTED
    ):
        return f"{folder} does not fit: {_what_to_do([], saved, args)}"
    return None


def _entries(tree: Any) -> Iterator[tuple[str, str, tuple[int, ...] | None, bool]]:
    """Key, key in the checkpoint, global shape and whether that may differ, of all that is to be loaded."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    for entry in nested_values(tree):
        if isinstance(entry, ShardedTensorFactory):
            yield from _entries({"built": entry.build()})
        elif isinstance(entry, ShardedTensor):
            yield entry.key, entry.key, tuple(entry.global_shape), entry.allow_shape_mismatch
        elif isinstance(entry, ShardedObject):
            yield entry.key, entry.unique_key, None, True


def _some(entries: list[str]) -> str:
    names = list(dict.fromkeys(entries))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _what_to_do(keys: list[str], saved: Any, args: Namespace) -> str:
    changed = _changed(saved, args)
    then, now = ([_flag(n, getattr(source, n)) for n in changed] for source in (saved, args))
    if then:
        way_out = "give what it was saved with, or another --load"
        return f"it was saved with {' '.join(then)}, and this run has {' '.join(now)}; {way_out}"
    if keys and all(key.startswith("optimizer.") for key in keys):
        return "add --no-load-optim to start the optimizer anew"
    if keys and all("rng_state" in key for key in keys):
        return "add --no-load-rng"
    return "it is of another model; load it with the flags that it was saved with, or give another --load"


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"no {flag}"
    return flag if value is True else f"{flag} {value}"


def _changed(saved: Any, args: Namespace) -> list[str]:
    nothing = object()
    pairs = ((n, getattr(saved, n, nothing), getattr(args, n, nothing)) for n in _SIZES)
    return [n for n, then, now in pairs if nothing not in (then, now) and then != now]


def _is_hybrid(args: Any) -> bool:
    return bool(
        getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)
    )
