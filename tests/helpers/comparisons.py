"""What two runs or states must have in common, by value."""

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, load

from helpers.megatron_runs import Run


def assert_equal(found: object, wanted: object, where: str = "") -> None:
    """To the last bit, all the way down."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_equal(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), where
    else:
        assert found == wanted, where


def worst_error(run: Run, reference: Run, name: str = "final") -> float:
    found, wanted = run.merged(name), reference.merged(name)
    assert found.keys() == wanted.keys()
    return max(
        (torch.linalg.norm(found[key] - value) / torch.linalg.norm(value)).item()
        for key, value in wanted.items()
    )


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint as torch reads them; layers of a kind are stacked in one."""
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(value.size, dtype=value.properties.dtype)
        for name, value in found.items()
        if hasattr(value, "size") and not name.startswith("optimizer.")
    }
    load(weights, storage_reader=FileSystemReader(folder), no_dist=True)
    return weights
