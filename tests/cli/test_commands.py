"""The commands as users type them: torchrun with either module, and ``sso-megatron first-run``."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from helpers.megatron_runs import tiny
from helpers.paths import SCRIPTS
from helpers.processes import HANGS_AFTER
from helpers.terminal import Terminal

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(ranks: int, args: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    return subprocess.run(
        [*command, "-m", *args],
        capture_output=True,
        text=True,
        cwd=folder,
        env=ENVIRONMENT,
        timeout=HANGS_AFTER,
    )


def printed_losses(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"lm loss: (\S+)", output)]


@pytest.mark.slow
def test_an_unmodified_script_and_ours_train_alike(tmp_path: Path) -> None:
    """A user's own script with one changed flag, over two ranks, prints what our script prints."""
    argv = tiny("--spectral-mup-init", "--train-iters", 6, "--eval-iters", 1, tp=2)
    script = ["sso_megatron.run", str(SCRIPTS / "their_pretrain.py")]
    theirs = torchrun(2, [*script, *argv, "--spectral-run-dir", "theirs"], tmp_path)
    assert theirs.returncode == 0, theirs.stderr[-4000:]
    split = ["--split", "98,1,1"]
    ours = torchrun(2, ["sso_megatron.pretrain_gpt", *argv, *split, "--spectral-run-dir", "ours"], tmp_path)
    assert ours.returncode == 0, ours.stderr[-4000:]
    for ended in (theirs, ours):
        banner = [line for line in ended.stdout.splitlines() if "no CUDA device found" in line]
        assert len(banner) == 1 and "rehearsing Megatron on the CPU over Gloo" in banner[0]
    losses = printed_losses(ours.stdout)
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert printed_losses(theirs.stdout) == pytest.approx(losses, rel=1e-5)
    summaries = [json.loads((tmp_path / who / "summary.json").read_text()) for who in ("theirs", "ours")]
    for summary in summaries:
        assert summary["first_loss"] == pytest.approx(losses[0], rel=1e-6)
        assert summary["max_radius_error"] <= 1e-3
    (validation,) = re.findall(r"on validation set \| lm loss value: (\S+)", ours.stdout)
    assert summaries[1]["val_loss"] == pytest.approx(float(validation), rel=1e-6)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where first runs put their data, and find it again."""
    return tmp_path_factory.mktemp("first")


def first_run(output: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    ended = subprocess.run(
        [sys.executable, "-m", "sso_megatron.cli.main", "first-run", "--output", str(output), *args],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        timeout=HANGS_AFTER,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


@pytest.mark.slow
def test_first_run_with_another_optimizer(output: Path) -> None:
    """Shortened, too; all of them at full length are in docs/algorithms/index.md."""
    flags = ["--log-spectral-criterion", "5"]
    ended = first_run(output, "--optimizer", "spectra", "--iterations", "12", "--", *flags)
    summary = json.loads(ended.stdout.splitlines()[-1])
    assert summary["last_loss"] < 0.8 * summary["first_loss"]
    (folder,) = output.glob("spectra-2*")
    assert (folder / "criterion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_first_run(output: Path) -> None:
    """The main job, shortened: data, training, evaluation, picture, checkpoint, one JSON line."""
    ended = first_run(output, "--iterations", "12")
    summary = json.loads(ended.stdout.splitlines()[-1])
    progress = [line.split("  ")[0] for line in ended.stdout.splitlines() if line.startswith("iteration ")]
    assert progress[0].endswith("/12") and progress[-1] == "iteration 12/12"
    assert list(summary) == [
        *("first_loss", "last_loss", "val_loss", "max_radius_error", "iterations", "seconds", "time")
    ]
    assert 5.0 < summary["first_loss"] < 6.5, "about ln 264"
    assert summary["last_loss"] < 0.8 * summary["first_loss"]
    assert 1.0 < summary["val_loss"] < summary["first_loss"]
    assert summary["max_radius_error"] <= 1e-3
    assert summary["iterations"] == 12
    (folder,) = output.glob("sso-*")
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "checkpoint" / "iter_0000012" / "metadata.json").exists()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records] == list(range(1, 13))
    measured = [r["headlines"]["radius_error"] for r in records if "headlines" in r]
    assert len(measured) == 2 and all(0 <= error < 0.1 for error in measured)


@pytest.mark.slow
def test_a_failed_run_shows_why(tmp_path: Path) -> None:
    """Both ranks refuse the flag and end under torchrun; one line says why."""
    command = [sys.executable, "-m", "sso_megatron.cli.main", "first-run", "--output", str(tmp_path)]
    ended = subprocess.run(
        [*command, "--", "--sso-momentum", "2"],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        timeout=HANGS_AFTER,
    )
    assert ended.returncode != 0
    (line,) = [line for line in ended.stderr.splitlines() if "sso_megatron: error:" in line]
    assert "sso_megatron: error: --sso-momentum 2.0 must lie in [0, 1)" in line
    assert "Traceback" not in ended.stderr
    assert "{" not in ended.stdout.splitlines()[-1]


@pytest.mark.slow
def test_nothing_outlives_a_terminated_run(tmp_path: Path) -> None:
    """On a terminal; SIGTERM, as a time limit or a closed terminal sends it, ends the ranks too."""
    command = [sys.executable, "-m", "sso_megatron.cli.main", "first-run", "--output", str(tmp_path)]
    with Terminal(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}) as terminal:
        terminal.wait_for("5/150", "radius ✓ ok", "activations ✓ ok", "gradients ✓ ok", "tokens/s")
        assert len(ranks_of(tmp_path)) >= 3, "torchrun and two ranks"
        terminal.process.terminate()
        assert terminal.finish() == 128 + 15
        assert terminal.written.endswith(b"\x1b[?25h"), "the cursor is back"
    # The kernel may need a while for what has been killed. A run left alone would go on to its end.
    deadline = time.monotonic() + HANGS_AFTER
    while ranks_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    (metrics,) = tmp_path.glob("sso-*/metrics.jsonl")
    assert ranks_of(tmp_path) == [] and len(metrics.read_text().splitlines()) < 150


def ranks_of(folder: Path) -> list[str]:
    """Command lines of the processes that write below a folder, first-run's own apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if any(str(folder) in word for word in words) and "first-run" not in words:
                found.append(" ".join(words))
    return found


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_help_does_not_wait_for_torch(flag: str) -> None:
    code = "import sys; from sso_megatron.cli.main import main\n"
    code += f"try:\n    main([{flag!r}])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
    code += "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    *said, modules = shown.splitlines()
    assert f"sso-megatron {version('sso-megatron')}" in said or "first-run" in " ".join(said)
    assert not {"torch", "numpy", "megatron", "matplotlib", "rich"} & set(modules.split())
