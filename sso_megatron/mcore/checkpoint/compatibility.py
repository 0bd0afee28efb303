"""Checks whether a checkpoint fits the run that loads it, before Megatron loads it.

``wrong_optimizer`` and ``wrong_contents`` return what is wrong in one line, or None. No function here
issues a collective.
"""

from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sso_megatron.mcore.compat import private_api
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS
from sso_megatron.mcore.parameters.names import OPTIONAL_STATE

_SHOWN = 3
"""Number of keys that a message names."""

_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "max_position_embeddings", "vocab_size", "num_experts", "moe_ffn_hidden_size"),
    *("moe_shared_expert_intermediate_size", "mtp_num_layers", "swiglu", "qk_layernorm"),
    *("untie_embeddings_and_output_weights", "normalization", "hybrid_layer_pattern"),
)
"""Megatron's arguments that determine the shapes and names of weights."""

_ASSERTED = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
"""Arguments that must agree even where all shapes do. Megatron compares the first three itself, once
everything is loaded; where the vocabulary differs it loads the rows that overlap."""


def stored_contents(folder: Path) -> Mapping[str, Any]:
    """Return a torch_dist checkpoint's entries by key; a tensor's has its global shape as ``size``."""
    contents: Mapping[str, Any] = private_api.filesystem_reader(folder).read_metadata().state_dict_metadata
    return contents


# ---------------------------------------------------------------- the optimizer


def wrong_optimizer(folder: Path, saved: Any, args: Namespace) -> str | None:
    """Return what is wrong if stored optimizer state means nothing to this run's optimizer, else None.

    Args:
        folder: the checkpoint.
        saved: the arguments that it was saved with.
        args: this run's arguments.
    """
    name = getattr(saved, "optimizer", None)
    if name is None or getattr(saved, "no_save_optim", False) or _kind(name) == _kind(args.optimizer):
        return None
    if not {name, args.optimizer} & OPTIMIZERS.keys():
        return None  # neither is an optimizer of this package
    return (
        f"{folder} was saved with --optimizer {name}; its optimizer state cannot be loaded into "
        f"--optimizer {args.optimizer}: add --no-load-optim to keep iteration and weights and start the "
        "optimizer and its learning rate schedule anew"
    )


def _kind(name: str) -> Any:
    """Return a key that is equal for two optimizers whose state has the same meaning."""
    spec = OPTIMIZERS.get(name)
    return (spec.prefix, spec.fixed) if spec else name


# ---------------------------------------------------------------- keys and shapes


def drop_missing_optional(tree: Any, stored: Collection[str]) -> None:
    """Remove from a sharded state dict, in place, the optional objects that the checkpoint lacks.

    Optional is every object whose key begins with ``OPTIONAL_STATE``: the optimizer finds its values again.

    Args:
        tree: a sharded state dict, of nested dictionaries and lists.
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
    """Return what is wrong if a checkpoint lacks an entry to load or has it in another shape, else None.

    Args:
        folder: the checkpoint.
        wanted: this rank's sharded state dict, which is not changed.
        stored: the checkpoint's entries, from ``stored_contents``.
        saved: the arguments that the checkpoint was saved with.
        args: this run's arguments.
    """
    missing, misfits = [], []
    for key, unique_key, shape, may_differ in _entries(wanted):
        if unique_key not in stored:
            missing.append(key)
        elif shape is not None and not may_differ and tuple(stored[unique_key].size) != shape:
            misfits.append(f"{key} is {tuple(stored[unique_key].size)} in it and {shape} in this run")
    if misfits:
        return f"{folder} does not fit: {_some(misfits)}; {_what_to_do(misfits, saved, args)}"
    # With other values of --dist-ckpt-strictness Megatron goes on without the key, or names it itself.
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
    """Yield four values for each entry that is to be loaded.

    They are its key, its key in the checkpoint, its global shape, and whether the shape may differ.
    """
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
