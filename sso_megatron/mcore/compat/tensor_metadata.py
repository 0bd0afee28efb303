"""Lets Megatron read the list of a checkpoint's tensors as torch 2.15 writes it.

Megatron reads that list with most values of ``--dist-ckpt-strictness``, and hands all properties of a
tensor to ``torch.empty``; one of them, ``strides``, is none of its arguments.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sso_megatron.mcore.compat import private_api
from sso_megatron.mcore.compat.private_names import LOADER


def install() -> None:
    """Have Megatron leave out the property.

    Raises:
        UnsupportedError: this Megatron-Core lacks the function that reads the list.
    """
    path = f"{LOADER}.load_tensors_metadata"
    private_api.replace(path, _without_strides(private_api.existing(path)))


def _without_strides(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_tensors_metadata(self: Any, checkpoint_dir: Path, metadata: Any = None) -> Any:
        if metadata is None:
            metadata = private_api.filesystem_reader(checkpoint_dir).read_metadata()
        metadata = copy.copy(metadata)
        metadata.state_dict_metadata = {
            key: _plain(entry) for key, entry in metadata.state_dict_metadata.items()
        }
        return original(self, checkpoint_dir, metadata)

    return load_tensors_metadata


def _plain(entry: Any) -> Any:
    if not hasattr(entry, "properties"):
        return entry
    entry = copy.copy(entry)
    entry.properties = copy.copy(entry.properties)
    entry.properties.__dict__.pop("strides", None)
    return entry
