"""The versions of Megatron-Core and emerging-optimizers that this package works with."""

import dataclasses
import functools
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from sso_megatron.mcore.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Versions:
    """The versions of a package that work, and how to install one.

    Attributes:
        install: requirement for pip, without a version.
        tested: versions that the tests were run with.
        oldest: oldest ``(major, minor)`` version that works; older versions are refused.
        why: what older versions lack, worded to follow "versions before 0.18".
    """

    install: str
    tested: tuple[str, ...]
    oldest: tuple[int, int]
    why: str

    @property
    def way_out(self) -> str:
        """The command that installs a tested version."""
        return f"pip install '{self.install}=={self.tested[-1]}'"


MEGATRON = Versions(
    "megatron-core[training]",
    ("0.18.0", "0.18.2", "0.19.0", "0.19.2"),
    oldest=(0, 18),
    why="have no registry of emerging optimizers, through which the plugin enters",
)


EMERGING = Versions(
    "emerging-optimizers",
    ("0.3.0",),
    oldest=(0, 2),
    why="lack the class Lion, without which Megatron-Core cannot be imported",
)


def check_versions() -> None:
    """Refuse a megatron-core or emerging-optimizers that cannot work, and warn of untested minor versions.

    Raises:
        UnsupportedError: one of the two packages is missing or too old.
    """
    try:
        emerging = version("emerging-optimizers")
    except PackageNotFoundError:
        emerging = None
    _check("megatron-core", megatron_version(), MEGATRON)
    _check("emerging-optimizers", emerging, EMERGING)


@functools.cache
def megatron_version() -> str | None:
    """Return the version of the ``megatron.core`` that an import would find, or None if there is none.

    A source checkout may hide an installed wheel. The version is read from the file, since importing
    Megatron here would be too early for the CPU rehearsal.
    """
    try:
        spec = find_spec("megatron.core")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return None
    return version_in(Path(spec.origin).parent)


def version_in(core: Path) -> str:
    """Return the version of Megatron-Core in a folder ``megatron/core``.

    Raises:
        OSError: the folder has no readable ``package_info.py``.
    """
    text = (core / "package_info.py").read_text()
    return ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, re.MULTILINE))


def is_0_18() -> bool:
    """Return whether Megatron-Core has version 0.18, the oldest minor version that works."""
    return str(megatron_version()).startswith("0.18.")


def _check(package: str, found: str | None, known: Versions) -> None:
    if found is None:
        raise UnsupportedError(f"{package} is not installed; {known.way_out}")
    numbers = re.match(r"(\d+)\.(\d+)", found)
    minor = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if minor < known.oldest:
        raise UnsupportedError(
            f"{package} {found} cannot work: versions before {known.oldest[0]}.{known.oldest[1]} "
            f"{known.why}; {known.way_out}"
        )
    if f"{minor[0]}.{minor[1]}" not in {tested.rpartition(".")[0] for tested in known.tested}:
        _warn_once(
            f"{package} {found} was not tested, {', '.join(known.tested)} were; going on, and stopping "
            f"where something that the plugin needs is missing. To be sure: {known.way_out}"
        )


@functools.cache
def _warn_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"sso_megatron: warning: {text}", file=sys.stderr, flush=True)
