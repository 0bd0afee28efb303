"""Real Megatron runs for the tests: ``Megatron.run`` trains a tiny GPT over real process groups."""

import contextlib
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.paths import TESTS, WHEELS
from helpers.processes import HANGS_AFTER

# A tiny GPT with the parts of the paper's: GQA, SwiGLU, RMSNorm, RoPE, QK-norm, untied embeddings.
TINY = shlex.split("""
--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4
--group-query-attention --num-query-groups 2 --kv-channels 16 --seq-length 32
--max-position-embeddings 32 --swiglu --normalization RMSNorm --qk-layernorm
--position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear
--attention-dropout 0 --hidden-dropout 0 --transformer-impl local --no-persist-layer-norm
--mock-data --tokenizer-type NullTokenizer --vocab-size 128 --micro-batch-size 2
--global-batch-size 4 --train-iters 4 --lr 1e-2 --lr-decay-style cosine --lr-warmup-iters 2
--weight-decay 0.1 --log-interval 1 --eval-interval 1000 --eval-iters 0
""")
MOE = shlex.split("""
--num-experts 4 --moe-ffn-hidden-size 48 --moe-router-topk 2 --moe-layer-freq [0,1]
--moe-shared-expert-intermediate-size 32 --moe-token-dispatcher-type alltoall
--moe-router-load-balancing-type none
""")


# The other optimizers, with flags that tests give them.
FAMILY: dict[str, list[object]] = {
    "spectra": [],
    "spectra_clip_adamw": ["--spectra-clip-pre-clip-c", 0.1],
    # Rounding turns the sign of an entry near zero now and then, which moves it by twice the learning rate.
    "spectra_clip_signum": ["--lr", 1e-4],
    "spectra_clip_ademamix": [],
    "spectral_adam": [],
}


def tiny(*flags: object, tp: int = 1, optimizer: str = "sso") -> list[str]:
    """Command line of a tiny run. The padded vocabulary is 128 for every tensor-parallel size."""
    padding = ["--make-vocab-size-divisible-by", 128 // tp, "--tensor-model-parallel-size", tp]
    return [str(flag) for flag in [*TINY, *padding, "--optimizer", optimizer, *flags]]


@dataclass
class Run:
    """A finished run."""

    folder: Path
    codes: list[int | None]

    @property
    def losses(self) -> list[float]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    @property
    def summary(self) -> dict[str, float]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def log(self) -> str:
        return "\n".join(p.read_text() for p in sorted(self.folder.glob("rank*.log")))

    def saved(self, name: str) -> list[object]:
        """What ``probes.save`` wrote, by rank."""
        return [
            torch.load(self.folder / f"{name}{rank}.pt", weights_only=False)
            for rank in range(len(self.codes))
        ]

    def merged(self, name: str) -> dict:
        """The union of the dictionaries that all ranks saved; shared entries must agree."""
        union: dict = {}
        for part in self.saved(name):
            for key, value in part.items():
                if key in union and isinstance(value, torch.Tensor):
                    torch.testing.assert_close(value, union[key], rtol=0, atol=0)
                union[key] = value
        return union


def expert_by_itself(name: str) -> str:
    """The name that an expert of a grouped product has where experts are modules of their own."""
    pattern = r"experts\.linear_fc([12])\.weight(\d+)"
    return re.sub(pattern, r"experts.local_experts.\2.linear_fc\1.weight", name)


def assert_same_run(run: Run, reference: Run, losses: float = 1e-4, weights: float = 1e-3) -> None:
    """Losses at every iteration and final weights agree, relative; prints how well."""
    assert len(run.losses) == len(reference.losses)
    pairs = zip(run.losses, reference.losses, strict=True)
    worst_loss = max(abs(got - expected) / abs(expected) for got, expected in pairs)
    found = {expert_by_itself(name): weight for name, weight in run.merged("final").items()}
    wanted = {expert_by_itself(name): weight for name, weight in reference.merged("final").items()}
    assert found.keys() == wanted.keys()
    errors = {
        name: (torch.linalg.norm(found[name] - weight) / torch.linalg.norm(weight)).item()
        for name, weight in wanted.items()
    }
    worst = max(errors, key=errors.__getitem__)
    print(f"losses within {worst_loss:.1e}, weights within {errors[worst]:.1e} ({worst})")
    assert worst_loss <= losses
    assert errors[worst] <= weights, worst


def unpacked(version: str, folder: Path) -> Path:
    """``folder`` with the files of a megatron-core wheel in it; skips the test if there is no wheel."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = next(WHEELS.glob(f"megatron_core-{version}-{tag}-*.whl"), None)
    if wheel is None:
        pytest.skip(f"no wheel of megatron-core {version} for {tag} in .wheels; make wheels fetches it")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def free_port() -> int:
    """A port below those that the system hands out by itself, which would be stolen now and then."""
    for port in random.sample(range(12000, 32000), 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port between 12000 and 32000")


class Megatron:
    """Starts runs through the zygote."""

    def __init__(self, process: subprocess.Popen, base: Path) -> None:
        self.process = process
        self.base = base
        self.count = 0

    def run(
        self,
        argv: list[str],
        ranks: int = 1,
        calls: tuple[str, ...] = (),
        fails: bool = False,
        timeout: float = HANGS_AFTER,
        grace: float = 20,
        env: dict[str, str] | None = None,
        main: str = "sso_megatron.cli.train.pretrain_gpt:main",
    ) -> Run:
        """Train on ``ranks`` processes; ``calls`` are functions that each rank runs before that."""
        self.count += 1
        folder = self.base / f"run{self.count}"
        folder.mkdir()
        port = free_port()
        request = {
            "argv": argv,
            "ranks": ranks,
            "calls": [*calls, main],
            "folder": str(folder),
            "port": port,
            "timeout": timeout,
            "grace": grace,
            "env": env or {},
        }
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the zygote died"
        run = Run(folder, json.loads(answer))
        if not fails:
            assert run.codes == [0] * ranks, f"exit codes {run.codes}\n{run.log[-6000:]}"
        return run

    def train(self, argv: list[str], ranks: int = 1, calls: tuple[str, ...] = (), **options: Any) -> Run:
        """A run with records, so that losses and summary can be read."""
        return self.run([*argv, "--spectral-run-dir", "."], ranks, calls, **options)


@contextlib.contextmanager
def zygote(base: Path, folder: Path | None = None) -> Iterator[Megatron]:
    """A process that has imported Megatron, the one in ``folder`` if given; its runs go to ``base``."""
    path = [str(folder or ""), str(TESTS), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    with (base / "zygote.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "helpers.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=env,
        )
    ready = process.stdout.readline()
    assert ready == "ready\n", (base / "zygote.log").read_text()
    yield Megatron(process, base)
    process.stdin.close()
    process.wait(timeout=HANGS_AFTER)
