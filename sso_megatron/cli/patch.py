"""``sso-megatron patch`` applies the series of ``patches/`` to a Megatron-LM folder by ``git apply``."""

import argparse
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sso_megatron
from sso_megatron.mcore.compat import versions

SERIES = {"0.18": "core_v0.18", "0.19": "core_v0.19", "0.20": "main"}
"""Maps a minor version to its folder in ``patches/``; the last is that of Megatron-LM's main branch."""

_PACKAGE_INFO = Path("megatron", "core", "package_info.py")


class PatchError(ValueError):
    """An error that the user can repair, described in one line."""


@dataclass(frozen=True)
class PatchedFile:
    """The state of one patch in one file.

    Attributes:
        patch: name of the patch.
        file: path relative to the folder that is patched.
        state: ``applied``, ``not applied`` or ``does not fit``.
    """

    patch: str
    file: str
    state: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sso-megatron patch``."""
    parser.description = (
        "Show, apply or revert the patches for a Megatron-LM checkout. The plugin needs none of them; "
        "patches/README.md says what each is for."
    )
    parser.epilog = "check ends with 0 if all are applied, 1 if some can be, 2 if one does not fit."
    add = parser.add_argument
    add("action", choices=("check", "apply", "revert"), help="all patches of the series, or none")
    add("folder", type=Path, metavar="DIR", help="a Megatron-LM checkout, or a folder that holds the "
        "package megatron, such as an unpacked wheel")  # fmt: skip
    add("--patches", type=Path, metavar="DIR", help="the folder patches/ of this project (default: the "
        "one beside the package, in a checkout)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the ``patch`` command; for ``check``, return the exit code that its help describes."""
    target = Target(options.folder, options.patches)
    if options.action == "check":
        return _check(target)
    _change(target, reverse=options.action == "revert")
    return 0


class Target:
    """A folder that holds Megatron, and the series of patches for its version.

    Attributes:
        folder: folder with ``megatron`` in it.
        version: version of its Megatron-Core.
        series: folder of the patches.
        patches: the patches, in their order. Patches of a series change different files.
    """

    def __init__(self, folder: Path, patches: Path | None) -> None:
        """Find the version of Megatron-Core, and the series for it.

        Args:
            folder: folder to patch, as the user named it.
            patches: folder of all series, as the user named it; None for the one beside the package.

        Raises:
            PatchError: one of the folders is not what it must be, or git is missing.
        """
        self.folder = folder.resolve()
        if not (self.folder / _PACKAGE_INFO).is_file():
            raise PatchError(
                f"{folder} must hold {_PACKAGE_INFO}; name a Megatron-LM checkout, or the folder that the "
                "package megatron is installed in"
            )
        self.version = versions.version_in((self.folder / _PACKAGE_INFO).parent)
        name = SERIES.get(".".join(self.version.split(".")[:2]))
        if name is None:
            raise PatchError(
                f"{folder} holds megatron-core {self.version}; there are patches for "
                f"{', '.join(f'{minor}.x' for minor in SERIES)} (the last is the main branch)"
            )
        self.series = _patches_folder(patches) / name
        self.patches = sorted(self.series.glob("*.patch"))
        if not self.patches:
            raise PatchError(f"{self.series} must hold the patches for megatron-core {self.version}")
        if shutil.which("git") is None:
            raise PatchError("git must be installed; it applies the patches")

    def parts(self) -> list[PatchedFile]:
        """Return the state of every file that the series changes."""
        return [
            PatchedFile(patch.stem, file, self._state(patch, file))
            for patch in self.patches
            for file in self._files(patch)
        ]

    def _files(self, patch: Path) -> Iterator[str]:
        listed = self._git("--numstat", text=patch.read_text()).stdout
        yield from (line.split("\t")[2] for line in listed.splitlines())

    def _state(self, patch: Path, file: str) -> str:
        for state, direction in (("not applied", []), ("applied", ["--reverse"])):
            arguments = ["--check", f"--include={file}", *direction]
            if self._git(*arguments, text=patch.read_text()).returncode == 0:
                return state
        return "does not fit"

    def change(self, files: list[str], reverse: bool) -> None:
        """Apply the series to these files, or revert it; git changes all of them or none.

        Raises:
            PatchError: git could not apply or revert it.
        """
        for file in files:
            path = self.folder / file
            if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
                raise PatchError(f"{path} must be writable, and its folder; nothing was changed")
        arguments = [f"--include={file}" for file in files] + ["--reverse"] * reverse
        # One text: of several files, git would apply the first and then fail at the second.
        result = self._git(*arguments, text="".join(patch.read_text() for patch in self.patches))
        if result.returncode:
            raise PatchError(f"git apply: {' '.join(result.stderr.split())}")

    def _git(self, *arguments: str, text: str) -> subprocess.CompletedProcess[str]:
        # In a folder inside of a repository git would take paths from that repository's root, and silently
        # ignore all that are elsewhere: it must not look above the folder.
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        return subprocess.run(
            ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn", *arguments, "-"],
            cwd=self.folder,
            env=env | {"GIT_CEILING_DIRECTORIES": str(self.folder.parent), "LC_ALL": "C"},
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )


def _patches_folder(named: Path | None) -> Path:
    folder = named or Path(sso_megatron.__file__).resolve().parent.parent / "patches"
    if folder.is_dir():
        return folder
    if named is not None:
        raise PatchError(f"--patches {named} is no folder; name the folder patches/ of this project")
    raise PatchError(
        "no folder patches/ beside the package, which was installed without its checkout; name the one of "
        "a checkout with --patches"
    )


def _check(target: Target) -> int:
    print(f"megatron-core {target.version} in {target.folder}, series {target.series.name}")
    parts = target.parts()
    width = max(len(part.patch) for part in parts)
    for name in dict.fromkeys(part.patch for part in parts):
        print(f"{name:{width}}  {_described([part for part in parts if part.patch == name])}")
    states = {part.state for part in parts}
    return 2 if "does not fit" in states else int(states != {"applied"})


def _described(parts: list[PatchedFile]) -> str:
    """Return the state of one patch in words."""
    states = {part.state for part in parts}
    if len(states) == 1 and "does not fit" not in states:
        return parts[0].state
    by_state = {s: [part.file for part in parts if part.state == s] for s in sorted(states)}
    listed = "; ".join(f"{state}: {' '.join(files)}" for state, files in by_state.items())
    return listed if "does not fit" in states else f"half applied; {listed}"


def _change(target: Target, reverse: bool) -> None:
    parts = target.parts()
    misfits = [part for part in parts if part.state == "does not fit"]
    if misfits:
        listed = ", ".join(f"{part.file} ({part.patch})" for part in misfits)
        raise PatchError(
            f"nothing was changed: in {target.folder}, megatron-core {target.version}, patches do not fit "
            f"{listed}; put back local changes of these files, or see patches/README.md for the versions "
            "that the series is for"
        )
    wanted = "not applied" if reverse else "applied"
    files = [part.file for part in parts if part.state != wanted]
    if files:
        target.change(files, reverse)
    done = "reverted" if reverse else "applied"
    width = max(len(part.patch) for part in parts)
    for patch in target.patches:
        changed = any(part.state != wanted for part in parts if part.patch == patch.stem)
        print(f"{patch.stem:{width}}  {done if changed else f'{wanted}, as before'}")
