"""launch/train.sh without Slurm: what it prints, refuses and passes on; test_slurm.py has the training."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.processes import HANGS_AFTER

pytestmark = pytest.mark.slow
TRAIN = ROOT / "launch" / "train.sh"
NAMES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "RUNS", "RUN_DIR", "SCRIPT")


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in NAMES and not k.startswith("SLURM")}
    return kept | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | more


def call(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TRAIN, *words], env=environment(**env), cwd=ROOT, capture_output=True, text=True, check=False
    )


def without_flags(words: list[str], *flags: str) -> list[str]:
    """The words, but for some flags with their values."""
    for flag in flags:
        at = words.index(flag)
        words = words[:at] + words[at + 2 :]
    return words


def test_a_dry_run_prints_the_command_of_every_node() -> None:
    node = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "NPROC_PER_NODE": "8"}
    result = call("--dry-run", "tiny_dense_sso", "--lr", "2e-2", **node, NCCL_DEBUG="INFO", RUNS="my runs")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[::2] == ["# node 0 of 2", "# node 1 of 2"]
    first, second = (shlex.split(line) for line in lines[1::2])
    assert first[first.index("--node-rank") + 1] == "0" and second[second.index("--node-rank") + 1] == "1"
    assert without_flags(first, "--node-rank") == without_flags(second, "--node-rank")
    assert first[0] == "env" and "NCCL_DEBUG=INFO" in first and "CUDA_DEVICE_MAX_CONNECTIONS=1" in first
    values = dict(itertools.pairwise(first))
    assert values["--master-addr"] == "node0" and values["--nproc-per-node"] == "8"
    assert values["--save"] == values["--load"] == "my runs/tiny_dense_sso/checkpoints"
    assert values["--lr"] == "2e-2" and first.count("--lr") == 1
    assert not (ROOT / "my runs").exists()


def test_a_script_of_ones_own_and_a_point(tmp_path: Path) -> None:
    experiment = tmp_path / "mine.yaml"
    experiment.write_text(
        "about: rates\nfragments: [optimizer/sso]\nsweep:\n  --lr: [1e-3, 3e-3]\n", encoding="utf-8"
    )
    result = call("--point", "1", "--print-run-dir", str(experiment), RUNS="/scratch")
    assert result.stdout == "/scratch/mine/lr=3e-3\n"
    env = {"SCRIPT": "their script.py", "NPROC_PER_NODE": "1"}
    result = call("--dry-run", "--point", "1", str(experiment), **env)
    words = shlex.split(result.stdout.splitlines()[1])
    at = words.index("sso_megatron.run")
    assert words[at - 1 : at + 2] == ["-m", "sso_megatron.run", "their script.py"]
    values = dict(itertools.pairwise(words))
    assert values["--lr"] == "3e-3" and values["--save"] == "runs/mine/lr=3e-3/checkpoints"


def test_the_container_template_shows_its_commands() -> None:
    """All that can be seen of it without enroot and pyxis."""
    template = ROOT / "launch" / "slurm" / "container.sbatch"
    env = {"CONTAINER_IMAGE": "/images/sso.sqsh", "CONTAINER_MOUNTS": "/data:/data", "NPROC_PER_NODE": "8"}
    result = subprocess.run(
        ["bash", template, "--dry-run", "tiny_dense_sso"],
        env=environment(**env, NNODES="2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[2::2] == ["# node 0 of 2", "# node 1 of 2"]
    srun = shlex.split(lines[1])
    assert srun[0] == "srun" and srun[-3:] == ["launch/train.sh", "--commands", "COMMANDS"]
    assert "--container-image=/images/sso.sqsh" in srun
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in srun and f"--container-workdir={ROOT}" in srun


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        ([], {}, "name an experiment; sso-megatron render --list shows them"),
        (["--lr"], {}, "unknown option --lr; flags of Megatron come after the experiment"),
        (["--point", "x", "e"], {}, "--point=x must be a whole number from 0 on"),
        (["e"], {"NNODES": "two"}, "NNODES=two must be a whole number from 1 on"),
        (["e"], {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 must be below NNODES=2"),
        (["--point", "1", "e"], {"RUN_DIR": "r"}, "RUN_DIR=r would be that of every point; set RUNS"),
        (["--commands", "none"], {}, "--commands none: no such file; it is what a dry run prints"),
        (["e"], {"NNODES": "2", "RUN_DIR": "r"}, "NNODES=2 needs MASTER_ADDR, the name of node 0"),
        (
            ["e"],
            {"NPROC_PER_NODE": "0", "RUN_DIR": "r"},
            "NPROC_PER_NODE=0 must be a whole number from 1 on",
        ),
    ],
)
def test_what_is_refused(words: list[str], env: dict[str, str], message: str) -> None:
    result = call(*words, **env)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"launch/train.sh: error: {message}")


def test_an_unknown_experiment() -> None:
    result = call("--dry-run", "tiny_dense_ssso", NPROC_PER_NODE="1")
    assert result.returncode == 2
    assert "did you mean tiny_dense_sso?" in result.stderr


LISTENER = """
import os, signal, sys, time

signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
open("ready" + os.environ["RANK"], "w").close()
time.sleep(300)
open("was not ended", "w").close()
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_ranks(tmp_path: Path, number: signal.Signals) -> None:
    """SIGUSR1 passes torchrun by, whose exit code is then that of ranks which end by themselves."""
    (tmp_path / "listener.py").write_text(LISTENER, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    commands = tmp_path / "commands.txt"
    commands.write_text(
        f"# node 0 of 1, here\n{shlex.join([*torchrun, 'listener.py'])}\n", encoding="utf-8"
    )
    script = subprocess.Popen([TRAIN, "--commands", commands], env=environment(), cwd=tmp_path)
    try:
        deadline = time.monotonic() + HANGS_AFTER
        while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
            assert script.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        script.send_signal(number)
        assert script.wait(timeout=HANGS_AFTER) == (0 if number == signal.SIGUSR1 else 1)
        assert not (tmp_path / "was not ended").exists()
    finally:
        script.kill()


def test_commands_for_other_nodes_are_not_run(tmp_path: Path) -> None:
    commands = tmp_path / "commands.txt"
    commands.write_text("# node 0 of 10, here\ntrue \n", encoding="utf-8")
    result = call("--commands", str(commands))
    assert result.returncode == 2 and "has no command for node 0 of 1;" in result.stderr
