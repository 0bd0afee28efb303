"""The templates of launch/slurm in a real Slurm cluster of two nodes, by value against a run without it."""

import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from helpers.paths import ROOT, SCRIPTS
from helpers.runs import slurm_cluster
from helpers.runs.slurm_cluster import Cluster, wait_for

SLURM = ROOT / "launch" / "slurm"
EXPERIMENT = "tiny_dense_sso"
ITERATIONS = 30
LRS = ["1e-2", "5e-3"]
TENSOR_PARALLEL = ["--tensor-model-parallel-size=2"]
FLAGS = [f"--train-iters={ITERATIONS}", "--eval-iters=0", "--save-interval=5"]

pytestmark = pytest.mark.timeout(1800)


@dataclass
class Job:
    """A job that was submitted."""

    number: str
    run: Path
    log: Path
    hold: Path

    @property
    def losses(self) -> dict[int, float]:
        """Losses by iteration."""
        lines = map(json.loads, (self.run / "metrics.jsonl").read_text().splitlines())
        return {line["iteration"]: line["loss"] for line in lines if line.get("loss") is not None}

    @property
    def saved(self) -> int:
        """Iteration of the last checkpoint."""
        tracker = self.run / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0

    def told(self) -> str:
        """The job's own log and those of its nodes, for the message of a failing test."""
        logs = [self.log, *sorted(self.run.glob("logs/*/node-*.log"))]
        return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in logs if log.exists())


def environment(**more: str) -> dict[str, str]:
    """For scripts that train on the CPU, a rank on each node."""
    fixed = {"PYTHON": sys.executable, "NPROC_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return slurm_cluster.outside() | fixed | {"OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def patience() -> float:
    """Seconds that the first iteration may take to come, from how long the flags' check takes here."""
    start = time.monotonic()
    subprocess.run(
        [ROOT / "launch" / "train.sh", "--dry-run", EXPERIMENT],
        env=environment(), cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return 7 * (time.monotonic() - start)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := slurm_cluster.missing():
        pytest.skip(f"no {', '.join(missing)} here; on Debian: apt-get install slurm-wlm munge")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


class Submit:
    """``sbatch`` of a template on the nodes of the test."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder

    def __call__(
        self,
        name: str,
        template: str,
        *arguments: str,
        options: str = "",
        holds: Sequence[int] = (),
        **env: str,
    ) -> Job:
        run = self.folder / name / Path(arguments[0]).stem
        log = self.folder / f"{name}.log"
        job = Job("", run, log, self.folder / f"{name}.hold")
        job.hold.mkdir()
        for iteration in holds:
            (job.hold / str(iteration)).touch()
        if holds or env:
            env |= {"SCRIPT": str(SCRIPTS / "slurm_pretrain.py"), "HOLD": str(job.hold)}
        command = ["sbatch", "--parsable", f"--output={log}", "--gpus-per-node=0", *shlex.split(options)]
        command += [str(SLURM / template), *arguments]
        env = environment(RUNS=str(self.folder / name), **env)
        return replace(job, number=self.cluster.call(*command, env=env, cwd=ROOT).strip())


@pytest.fixture(scope="module")
def submit(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Submit:
    return Submit(cluster, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of two learning rates."""
    path = tmp_path_factory.mktemp("configs") / "rates.yaml"
    path.write_text(
        "about: two learning rates\n"
        "fragments:\n"
        "  [model/qwen3_like, model/tiny_dense, optimizer/sso, training/tiny, data/mock, parallel/cpu]\n"
        "flags:\n  --save-interval: 20\n  --eval-iters: 0\n"
        f"sweep:\n  --lr: [{', '.join(LRS)}]\n"
    )
    return path


@dataclass
class Jobs:
    """All that run at the same time, by what happens to them."""

    plain: Job
    limited: Job
    failing: Job
    fruitless: Job
    sick: Job
    wrong: Job
    refused: Job
    points: list[Job]


@pytest.fixture(scope="module")
def jobs(submit: Submit, patience: float, sweep: Path) -> Jobs:
    """Submitted together, as they mostly wait; three run at a time, and two of them stay for long."""
    limit = math.ceil(2 + patience / 60)  # minutes; the warning comes one to two of them before
    two, limits = "--nodes=2", f"--nodes=2 --time={limit} --signal=B:USR1@60"
    plain = submit("plain", "train.sbatch", EXPERIMENT, *FLAGS, *TENSOR_PARALLEL, options=two)
    limited = submit(
        "limited", "requeue.sbatch", EXPERIMENT, *FLAGS, *TENSOR_PARALLEL, options=limits, holds=[8]
    )
    fruitless = submit(
        "fruitless", "requeue.sbatch", EXPERIMENT, *FLAGS, options="--nodes=1 --hold", FAULT="crash"
    )
    health = ["--log-spectral-metrics=1", "--spectral-health=stop", "--no-check-for-nan-in-loss-and-grad"]
    sick = submit("sick", "requeue.sbatch", EXPERIMENT, *FLAGS, *health, FAULT="spoil")
    wrong = submit("wrong", "requeue.sbatch", EXPERIMENT, "--sso-momentum=much")
    refused = submit("refused", "requeue.sbatch", EXPERIMENT, "--sso-momentum=2")
    failing = submit("failing", "requeue.sbatch", EXPERIMENT, *FLAGS, options=two, holds=[7, 12])
    array = submit("sweep", "sweep.sbatch", str(sweep), options="--array=0-1")
    points = [replace(array, number=f"{array.number}_{i}", run=array.run / f"lr={LRS[i]}") for i in (0, 1)]
    return Jobs(plain, limited, failing, fruitless, sick, wrong, refused, points)


@pytest.fixture(scope="module")
def reference(megatron, tmp_path_factory) -> dict[int, float]:
    """Losses of the same experiment on one rank, without Slurm."""
    words = subprocess.run(
        [sys.executable, "-m", "sso_megatron.cli.main", "render", "--null", EXPERIMENT, *FLAGS],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")[:-1]  # fmt: skip
    losses = megatron.train([*words, "--save", "checkpoints"]).losses
    return dict(enumerate(losses, 1))


def worst(losses: dict[int, float], reference: dict[int, float]) -> float:
    """Largest relative difference over all iterations."""
    assert losses.keys() == reference.keys()
    return max(abs(losses[i] - expected) / expected for i, expected in reference.items())


def test_two_nodes_train_like_one_rank(cluster: Cluster, jobs: Jobs, reference: dict[int, float]) -> None:
    job = jobs.plain
    assert cluster.wait(job.number) == "COMPLETED", job.told()
    difference = worst(job.losses, reference)
    print(f"two nodes, TP 2: losses within {difference:.1e} of one rank's")
    assert difference <= 1e-4
    logs = job.run / "logs" / f"{job.number}-0"
    commands = (logs / "commands.txt").read_text().splitlines()
    assert commands[::2] == ["# node 0 of 2, n1", "# node 1 of 2, n2"]
    assert " --node-rank 1 " in commands[3] and " --tensor-model-parallel-size 2" in commands[3]
    assert {path.name for path in logs.glob("node-*.log")} == {"node-0.log", "node-1.log"}
    assert job.log.read_text().endswith(" finished\n")


def test_a_wrong_flag_ends_the_job_before_any_rank(cluster: Cluster, jobs: Jobs) -> None:
    job = jobs.wrong
    assert cluster.wait(job.number) == "FAILED", job.told()
    assert cluster.state(job.number)["ExitCode"] == "2:0"
    (error,) = [line for line in job.log.read_text().splitlines() if "error" in line]
    assert "--sso-momentum" in error
    assert not list(job.run.glob("logs/*/node-*.log")) and not (job.run / "requeues.log").exists()


def test_the_time_limit_saves_and_queues_again(cluster: Cluster, jobs: Jobs) -> None:
    job = jobs.limited
    assert cluster.wait(job.number) == "COMPLETED", job.told()
    entry, *others = (job.run / "requeues.log").read_text().splitlines()
    assert cluster.state(job.number)["Restarts"] == str(1 + len(others)), job.told()
    assert entry.endswith(f"job {job.number} start 0: the time limit is near, at iteration 8")
    for start in range(1, 1 + len(others)):  # the termination of the step before, which has the same number
        logs = (job.run / "logs" / f"{job.number}-{start}").glob("node-*.log")
        assert any("*** STEP" in (text := log.read_text()) and "CANCELLED AT" in text for log in logs)
    assert f"goes on from iteration 8; logs in {job.run}/logs/{job.number}-1" in job.log.read_text()
    assert job.losses == jobs.plain.losses, "to the last bit"


def test_a_sweep_has_a_folder_for_each_point(cluster: Cluster, jobs: Jobs) -> None:
    for job in jobs.points:
        assert cluster.wait(job.number) == "COMPLETED", job.told()
    first, second = jobs.points
    assert first.saved == second.saved == len(first.losses) == len(second.losses) == 20
    assert first.losses[1] == second.losses[1] and first.losses[20] != second.losses[20], (
        "one start, two rates"
    )


def test_a_refused_setting_is_not_tried_again(cluster: Cluster, jobs: Jobs) -> None:
    job = jobs.refused
    assert cluster.wait(job.number) == "FAILED", job.told()
    text = job.log.read_text()
    assert "sso_megatron: error: --sso-momentum" in text and text.endswith(" not queued again\n")
    assert not (job.run / "requeues.log").exists()


def test_a_sick_run_is_not_queued_again(cluster: Cluster, jobs: Jobs) -> None:
    job = jobs.sick
    assert cluster.wait(job.number) == "FAILED", job.told()
    assert job.log.read_text().endswith(" stopped by --spectral-health: not queued again\n")
    assert cluster.state(job.number)["Restarts"] == "0"


def test_what_fails_without_a_new_checkpoint_is_given_up(cluster: Cluster, jobs: Jobs) -> None:
    """The job is held until its log has the lines of two starts before."""
    job = jobs.fruitless
    job.run.mkdir(parents=True)
    line = f"2026-11-23 10:00:00 job {job.number} start 0: failed, at iteration 0\n"
    (job.run / "requeues.log").write_text(2 * line)
    cluster.call("scontrol", "release", job.number)
    assert cluster.wait(job.number) == "FAILED", job.told()
    assert job.log.read_text().endswith(" no checkpoint after iteration 0 in 3 starts: not queued again\n")
    assert "exitcode  : 1" in job.log.read_text(), "what torchrun says of it"


def rank_of(cluster: Cluster, job: Job, rank: int) -> int:
    """The process number of a rank; what it has started has its environment, too."""
    family = {
        pid
        for pid, env in cluster.processes()
        if env.get("SLURM_JOB_ID") == job.number and env.get("RANK") == str(rank)
    }
    (found,) = [pid for pid in family if slurm_cluster.parent_of(pid) not in family]
    return found


def test_failures_queue_the_job_again(cluster: Cluster, jobs: Jobs, reference: dict[int, float]) -> None:
    """First a rank is killed, then, in the second start, its whole node."""
    job = jobs.failing
    wait_for(lambda: job.saved == 5, 600, "the first checkpoint")
    slurm_cluster.kill(rank_of(cluster, job, 1))
    wait_for(lambda: cluster.state(job.number)["Restarts"] == "1", 300, "the job to be queued again")
    (job.hold / "7").unlink()
    text = job.log.read_text()
    assert "failed: srun ended with exit code 1" in text
    assert "Signal 9 (SIGKILL)" in text and "rank      : 1" in text, "the log names what failed first"
    (entry,) = (job.run / "requeues.log").read_text().splitlines()
    assert entry.endswith(f"job {job.number} start 0: failed: srun ended with exit code 1, at iteration 5")

    wait_for(lambda: job.saved == 10, 600, "a checkpoint of the second start")
    cluster.kill_node("n2")
    wait_for(lambda: int(cluster.state(job.number)["Restarts"]) >= 2, 300, "the job to be queued again")
    (job.hold / "12").unlink()
    cluster.start_node("n2")
    assert cluster.wait(job.number) == "COMPLETED", job.told()
    difference = worst(job.losses, reference)
    print(
        f"a rank killed, then a node: losses within {difference:.1e} of one rank's\n{job.log.read_text()}"
    )
    assert difference <= 1e-4
