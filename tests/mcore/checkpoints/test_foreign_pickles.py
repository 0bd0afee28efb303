"""Checkpoints of strangers: the names in their pickles are looked at before anything is unpickled."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import random
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from helpers.megatron_runs import Megatron, Run, tiny
from sso_megatron.mcore.checkpoint.pickles import find_foreign

SAVE = ("--save", "ckpt", "--save-interval", 2)


class Command:
    """Makes a pickle that runs a command where it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.fixture(scope="module")
def trained(megatron: Megatron) -> Callable[[str], Run]:
    runs = {
        form: megatron.run(tiny(*SAVE, "--ckpt-format", form, tp=2), 2) for form in ("torch_dist", "torch")
    }
    return runs.__getitem__


@pytest.fixture
def checkpoint(trained: Callable[[str], Run], tmp_path: Path) -> Path:
    """A copy of a sound checkpoint, without the hashes, which a stranger would write himself."""
    shutil.copytree(trained("torch_dist").folder / "ckpt", tmp_path / "ckpt")
    folder = tmp_path / "ckpt" / "iter_0000004"
    (folder / "integrity.json").unlink()
    return folder


def spoil_metadata(folder: Path, target: Path) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    metadata.planner_data = {"more": Command(target)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def spoil_an_object(folder: Path, target: Path, key: str = "common_state/") -> None:
    """Put another archive behind the numbers of a file of tensors, in the place of an object."""
    metadata = FileSystemReader(folder).read_metadata()
    index = next(index for index in metadata.storage_data if index.fqn.startswith(key))
    archive = io.BytesIO()
    torch.save([{"args": Command(target)}], archive)
    info = metadata.storage_data[index]
    with (folder / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), len(archive.getvalue())
        file.write(archive.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def spoil_any_object(folder: Path, target: Path) -> None:
    spoil_an_object(folder, target, "optimizer.spectral.")


def spoil_common(folder: Path, target: Path) -> None:
    """The file in which Megatron-Core 0.18 keeps arguments, and which 0.19 still reads first."""
    torch.save({"args": Command(target)}, folder / "common.pt")


SPOILS = [spoil_metadata, spoil_an_object, spoil_any_object, spoil_common]


def assert_refused(run: Run, target: Path, message: str = " would construct posix.system, which") -> None:
    assert set(run.codes) == {2}
    errors = [line for line in run.log.splitlines() if "error: " in line]
    assert len(errors) == 1 and message in errors[0], run.log[-3000:]
    assert "Traceback" not in run.log
    assert not target.exists()


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_run_does_not_load_it(megatron: Megatron, checkpoint: Path, tmp_path: Path, spoil: Any) -> None:
    spoil(checkpoint, tmp_path / "ran")
    argv = tiny("--load", checkpoint.parent, "--train-iters", 5, tp=2)
    assert_refused(megatron.run(argv, 2, fails=True), tmp_path / "ran")


@pytest.mark.parametrize("spoil", [spoil_metadata, spoil_an_object, spoil_common])
def test_nor_its_arguments(megatron: Megatron, checkpoint: Path, tmp_path: Path, spoil: Any) -> None:
    spoil(checkpoint, tmp_path / "ran")
    argv = tiny("--load", checkpoint.parent, "--use-checkpoint-args", tp=2)
    assert_refused(megatron.run(argv, 2, fails=True), tmp_path / "ran")


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("command", ["export", "plot"])
def test_nor_do_commands(
    megatron: Megatron, checkpoint: Path, tmp_path: Path, spoil: Any, command: str
) -> None:
    spoil(checkpoint, tmp_path / "ran")
    checkpoint.parent.rename(tmp_path / "checkpoint")  # where a run's folder has it
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "time": 1.0, "loss": 2.0}\n')
    words = {
        "export": ["export", "--load", tmp_path / "checkpoint", "--out", tmp_path / "weights"],
        "plot": ["plot", tmp_path, "--weights", "linear_fc2"],
    }
    run = megatron.run([*map(str, words[command])], main="probes.command:command", fails=True)
    assert_refused(run, tmp_path / "ran")


def test_nor_the_other_format(megatron: Megatron, trained: Callable[[str], Run], tmp_path: Path) -> None:
    shutil.copytree(trained("torch").folder / "ckpt", tmp_path / "ckpt")
    torch.save(
        {"args": Command(tmp_path / "ran")}, next(tmp_path.glob("ckpt/iter_0000004/mp_rank_01/*.pt"))
    )
    argv = tiny("--load", tmp_path / "ckpt", "--ckpt-format", "torch", "--train-iters", 5, tp=2)
    assert_refused(megatron.run(argv, 2, fails=True), tmp_path / "ran")


def test_sound_checkpoints_are_not_refused(trained: Callable[[str], Run]) -> None:
    for form in ("torch_dist", "torch"):
        for folder in (trained(form).folder / "ckpt").glob("iter_*"):
            assert find_foreign(folder) is None


# ---------------------------------------------------------------- pickles that hide what they name

_START, _CALL = b"\x80\x04", b"X\x04\x00\x00\x00true\x85R"
_SYSTEM = b"\x8c\x05posix\x8c\x06system\x93"
HIDDEN = {
    "by its two strings": _START + _SYSTEM + _CALL + b".",
    "by strings from the memo": (
        _START + b"\x8c\x06system\x94\x8c\x05posix\x9400h\x01h\x00\x93" + _CALL + b"."
    ),
    "an attribute of a known name": _START + b"\x8c\x08argparse\x8c\x12Namespace.__init__\x93]\x85R.",
    "a module through a known one": _START + b"\x8c\x08argparse\x8c\x0a_os.system\x93" + _CALL + b".",
    "the oldest protocol": b"cposix\nsystem\n(Vtrue\ntR.",
    "an instance": b"(Vtrue\niposix\nsystem\n.",
    "an object of the oldest protocol": b"(cposix\nsystem\nVtrue\no.",
    "a name that Python 2 had": b"c__builtin__\neval\n(V1\ntR.",
    "in a dictionary": _START + b"}" + _SYSTEM + _CALL + b"K\x01s.",
    "below another value": pickle.dumps({}, 4)[:-1] + b"0cposix\nsystem\n(Vtrue\ntR.",
    "an extension": _START + b"\x82\x01.",
    "torch's own loader": _START + b"\x8c\x05torch\x8c\x04load\x93" + _CALL + b".",
    "numpy's loader": _START + b"\x8c\x05numpy\x8c\x04load\x93" + _CALL + b".",
    "a getter": _START + b"\x8c\x08builtins\x8c\x07getattr\x93\x8c\x01x\x8c\x01y\x86R.",
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_names(tmp_path: Path, hidden: str) -> None:
    (tmp_path / ".metadata").write_bytes(HIDDEN[hidden])
    found = find_foreign(tmp_path)
    assert found is not None and found.startswith(f"{tmp_path / '.metadata'} ")
    archive = tmp_path / "common.pt"
    archive.write_bytes(archive_of(HIDDEN[hidden]))
    (tmp_path / ".metadata").unlink()
    found = find_foreign(tmp_path)
    assert found is not None and found.startswith(f"{archive} ")


def test_a_module_that_torch_would_run(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "common.pt")
    assert "would construct a TorchScript module" in str(find_foreign(tmp_path))


def test_an_archive_of_old_versions_of_torch(tmp_path: Path) -> None:
    torch.save({"args": 1}, tmp_path / "common.pt", _use_new_zipfile_serialization=False)
    assert "common.pt cannot be read (RuntimeError: " in str(find_foreign(tmp_path))


# ---------------------------------------------------------------- mutations


_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "compile")
"""Events by which code that a pickle names would show."""


@pytest.fixture
def ran() -> Iterator[list[str]]:
    """Those events in this process; a hook stays for the rest of it."""
    seen: list[str] = []
    watches = [True]
    sys.addaudithook(lambda event, args: seen.append(event) if watches[0] and event in _CODE else None)
    yield seen
    watches[0] = False


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, left out or put elsewhere, or a call put somewhere."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out))
        match rng.randrange(5):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                del out[at : at + rng.randint(1, 40)]
            case 2:
                out[at:at] = rng.randbytes(rng.randint(1, 8))
            case 3:
                start = rng.randrange(len(out))
                out[at:at] = out[start : start + rng.randint(1, 200)]
            case _:
                out[at:at] = b"cposix\nsystem\n(Vtrue\ntR"
        out = out or bytearray(b".")
    return bytes(out)


def archive_of(pickled: bytes) -> bytes:
    """The archive that torch would have written."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3")
    return archive.getvalue()


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_mutations(checkpoint: Path, ran: list[str], name: str) -> None:
    """No code runs, nothing hangs; what is not refused is really read, and that runs nothing either."""
    rng, outcomes = random.Random(name), Counter()
    sound = (checkpoint / ".metadata").read_bytes()
    if name == "common.pt":
        sound = pickle.dumps({"args": argparse.Namespace(seed=1, lr=[0.1] * 40), "iteration": 4}, 2)
    for number in range(500):
        changed = mutated(sound, rng)
        if name == "common.pt":  # the pickle in a sound archive, and every third time the archive itself
            changed = archive_of(changed) if number % 3 else mutated(archive_of(sound), rng)
        (checkpoint / name).write_bytes(changed)
        found = find_foreign(checkpoint)
        if found is None:
            outcomes["read"] += 1
            with contextlib.suppress(Exception):
                FileSystemReader(checkpoint).read_metadata()
                torch.load(checkpoint / "common.pt")
        else:
            assert found.startswith(str(checkpoint))
            outcomes["refused" if "would construct" in found else "unreadable"] += 1
    print(dict(outcomes))
    assert ran == []
    assert min(outcomes["refused"], outcomes["unreadable"]) > 20
