"""Finds what a checkpoint's pickles would construct, before anything in it is unpickled.

Unpickling calls what a pickle names, so that a checkpoint can run any code. Here every name is compared
with the list of what Megatron-Core and torch write into checkpoints; anything else is refused. To find the
names a pickle is read with stand-ins for all that it names, so nothing of it runs here. Tensors are not
looked at: torch reads them with ``weights_only``.
"""

import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

_DCP = "torch.distributed.checkpoint"
_NAMES = {
    # What torch writes: tensors, and the metadata of a distributed checkpoint.
    "builtins": ("set",),
    "collections": ("OrderedDict",),
    "torch": ("Size", "device"),
    "torch._C": ("Generator",),
    "torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter"),
    "torch.serialization": ("_get_layout",),
    "torch.storage": ("TypedStorage", "UntypedStorage"),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    f"{_DCP}.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    ),
    f"{_DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    # What Megatron-Core writes: arguments, states of random generators and of its rerun state machine. It
    # has these names on a list of its own, core/safe_globals.py, for the files that it reads with care.
    "_codecs": ("encode",),  # bytes, in the state of NumPy's generator
    "argparse": ("Namespace",),
    **dict.fromkeys(("io", "_io"), ("BytesIO",)),
    "pathlib": ("PosixPath",),
    "signal": ("Signals",),
    "types": ("SimpleNamespace",),
    "numpy": ("ndarray", "dtype"),
    "numpy.dtypes": ("UInt32DType",),
    **dict.fromkeys(("numpy._core.multiarray", "numpy.core.multiarray"), ("_reconstruct",)),
    "megatron.core.enums": ("ModelType",),
    "megatron.core.optimizer.optimizer_config": ("OptimizerConfig",),
    "megatron.core.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState"),
    "megatron.core.transformer.enums": (
        *("AttnBackend", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope"),
    ),
}
"""The names by module. Whatever they are called with, they do no more than make a value."""


class _Foreign(pickle.UnpicklingError):
    """Reports a name that is not on the list."""


class _Standin:
    """Takes the place of everything that a pickle names, and of everything that this makes."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Standin":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what a constructor would get."""

    def __call__(self, *args: Any, **kwargs: Any) -> "_Standin":
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an item, as a dictionary would."""

    def __setstate__(self, state: Any) -> None:
        """Take the state of an object."""

    def append(self, item: Any) -> None:
        """Take an item, as a list would."""

    extend = add = append


class _Reader(pickle.Unpickler):
    """Reads a pickle without making anything of it."""

    def find_class(self, module: str, name: str) -> Any:
        if not _is_known(module, name):
            raise _Foreign(f"{module}.{name}")
        return _Standin

    def persistent_load(self, pid: Any) -> Any:
        return _Standin()  # a tensor's numbers


def _is_known(module: str, name: str) -> bool:
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return True
    if module == "torch" and name.endswith("Storage"):
        return name.isidentifier()
    return name in _NAMES.get(module, ())


def find_foreign(folder: Path, rank: int = 0, size: int = 1, reads: bool = True) -> str | None:
    """Return in words what is wrong with a rank's share of a checkpoint's pickles, or None.

    A pickle that cannot be read is wrong as well, since a part of it might run. No collectives.

    Args:
        folder: a checkpoint of the format torch_dist or torch.
        rank: this rank's number among the ranks that share the work.
        size: number of ranks that share the work.
        reads: look at all objects among the tensors; otherwise at those that arguments are read from.
    """
    path = folder
    try:
        for path, pickled in _pickles(folder, rank, size, reads):  # noqa: B007  errors name the path
            _Reader(pickled()).load()
    except _Foreign as error:
        return (
            f"{path} would construct {error}, which neither Megatron-Core nor torch writes into a "
            "checkpoint: it may run any code"
        )
    except Exception as error:  # anything may be raised by bytes that somebody has chosen
        return f"{path} cannot be read ({type(error).__name__}: {error})"
    return None


def _pickles(
    folder: Path, rank: int, size: int, reads: bool
) -> Iterator[tuple[Path, Callable[[], BinaryIO]]]:
    """Yield a function that opens each pickle of a checkpoint, with its file; the metadata is the first."""
    metadata = folder / ".metadata"
    if metadata.is_file():
        yield metadata, lambda: io.BytesIO(metadata.read_bytes())
    for path in sorted([*folder.glob("common.pt"), *folder.glob("mp_rank_*/*.pt")])[rank::size]:
        yield path, partial(_pickle_in, path, 0, -1)
    if metadata.is_file():
        for path, offset, length in _objects(folder, reads)[rank::size]:
            yield path, partial(_pickle_in, path, offset, length)


def _objects(folder: Path, reads: bool) -> list[tuple[Path, int, int]]:
    """Return file, offset and length of the objects that lie among a distributed checkpoint's tensors."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = FileSystemReader(folder).read_metadata()
    kinds = metadata.state_dict_metadata
    return sorted(
        (folder / info.relative_path, info.offset, info.length)
        for index, info in metadata.storage_data.items()
        if isinstance(kinds.get(index.fqn), BytesStorageMetadata)
        and (reads or index.fqn.startswith("common_state/"))
    )


def _pickle_in(path: Path, offset: int, length: int) -> BinaryIO:
    """Return the pickle in an archive as torch's own reader finds it; names in it may be there twice.

    Args:
        path: a file, which is the archive or holds it.
        offset: first byte of the archive.
        length: bytes of the archive; -1 for a file that is one.

    Raises:
        _Foreign: the archive is a TorchScript module, which torch would run.
        RuntimeError: it is no archive. Older versions of torch wrote pickles without one.
    """
    archive: Any = str(path)
    if length >= 0:
        with path.open("rb") as file:
            file.seek(offset)
            archive = io.BytesIO(file.read(length))
    reader = torch._C.PyTorchFileReader(archive)
    if "constants.pkl" in reader.get_all_records():
        raise _Foreign("a TorchScript module")
    return io.BytesIO(reader.get_record("data.pkl"))
