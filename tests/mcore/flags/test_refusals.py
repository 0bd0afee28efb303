"""Bad flags, and bad installations, end with one line before any process group."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.megatron_runs import Megatron, Run, tiny

ERRORS = [
    (["--sso-solver", "newton"], "--sso-solver 'newton' must be one of tracking, bisection"),
    (["--sso-momentum", "1.5"], "--sso-momentum 1.5 must lie in [0, 1); the default is 0.9"),
    (["--sso-coefficient-type", "cubic"], "--sso-coefficient-type 'cubic' must be one of"),
    (["--spectral-tp-mode", "magic"], "--spectral-tp-mode 'magic' must be one of auto, duplicated"),
    (["--spectral-workspace-mib", "0"], "--spectral-workspace-mib 0 must be at least 1"),
    (
        ["--sso-solver-tolerance", "1e-3"],
        "--sso-solver-tolerance has an effect only with --sso-solver bisection",
    ),
    (
        ["--sso-retract-alpha", "0.1"],
        "--sso-retract-alpha has an effect only with --sso-retract-mode dynamic",
    ),
    (["--fp16"], "--fp16 with --optimizer sso: float16 gradients overflow"),
    (
        ["--use-distributed-optimizer", "--no-use-layer-wise-param-layout"],
        "--no-use-layer-wise-param-layout with --optimizer sso: whole matrices need that layout",
    ),
    (
        ["--use-distributed-optimizer", "--num-distributed-optimizer-instances", "2"],
        "--num-distributed-optimizer-instances 2 with --optimizer sso: matrices are sharded over all",
    ),
    (
        ["--overlap-param-gather-with-optimizer-step"],
        "--overlap-param-gather-with-optimizer-step with --optimizer sso: all parts of the optimizer step",
    ),
    (
        ["--sso-radius-mode", "from_weights", "--spectral-mup-init"],
        "--sso-radius-mode from_weights with --spectral-mup-init: weights are drawn for radii that",
    ),
    (
        ["--use-distributed-optimizer", "--save", "ckpt", "--no-save-optim", "--ckpt-format", "torch"],
        "--ckpt-format torch with --use-distributed-optimizer with --optimizer sso: Megatron keeps its",
    ),
    (["--use-precision-aware-optimizer"], "--use-precision-aware-optimizer with --optimizer sso"),
    (["--fp8-param-gather"], "--fp8-param-gather with --optimizer sso: matrices are gathered in the"),
    (["--loss-scale", "128"], "--loss-scale with --optimizer sso: bf16 and fp32 need none"),
    (
        ["--init-model-with-meta-device"],
        "--init-model-with-meta-device with --optimizer sso: Megatron then",
    ),
    (
        ["--tensor-parallel-num-weight-shards", "2"],
        "--tensor-parallel-num-weight-shards 2 with --optimizer sso: matrices must not be cut beyond",
    ),
    (
        ["--spectral-flops-per-byte", "50", "--spectral-tp-mode", "owner"],
        "--spectral-flops-per-byte has an effect only with --spectral-tp-mode auto",
    ),
    (["--optimizer-cpu-offload"], "--optimizer-cpu-offload with --optimizer sso"),
    (["--use-torch-fsdp2"], "--use-torch-fsdp2 with --optimizer sso"),
    (
        ["--optimizer", "muon_sphere", "--sso-tangent", "project"],
        "--sso-tangent with --optimizer muon_sphere",
    ),
    (
        ["--optimizer", "muon_sphere", "--sso-solver-trials", "3"],
        "--sso-solver-trials with --optimizer muon",
    ),
    (["--optimizer", "adam", "--spectral-mup-init"], "--spectral-mup-init with --optimizer adam: has no"),
    (
        ["--optimizer", "muon", "--sso-momentum", "0.8"],
        "--sso-momentum with --optimizer muon: has no effect",
    ),
    (
        ["--optimizer", "spectra", "--sso-momentum", "0.8"],
        "--sso-momentum with --optimizer spectra: has no effect; leave it out, or use --optimizer sso or",
    ),
    (["--spectra-eps", "1e-6"], "--spectra-eps with --optimizer sso: has no effect; leave it out, or use"),
    (
        ["--optimizer", "spectra_clip_signum", "--spectra-clip-beta2", "0.9"],
        "--spectra-clip-beta2 with --optimizer spectra_clip_signum: has no effect; leave it out",
    ),
    (
        ["--optimizer", "spectra_clip_adamw", "--spectra-clip-c-final", "0.5"],
        "--spectra-clip-c-final 0.5 has an effect only with c_decay; the default is 0.0",
    ),
    (
        ["--optimizer", "spectra_clip_adamw", "--spectra-clip-c", "0"],
        "--spectra-clip-c 0.0 must lie in [1e-6, 1e9]; the default is 10.0",
    ),
    (
        [
            *("--optimizer", "spectra_clip_adamw", "--step-batch-size-schedule", "0:2 8:4"),
            *("--train-samples", "16", "--spectra-clip-c-warmup-steps", "1"),
        ],
        "--train-samples with --step-batch-size-schedule: does not tell the number of steps, which "
        "--optimizer spectra_clip_adamw goes by; give --spectra-clip-train-steps (1 for",
    ),
    (
        ["--optimizer", "spectra", "--spectral-mup-init"],
        "--spectral-mup-init with --optimizer spectra: it keeps weights on no spheres; leave it out",
    ),
    (
        ["--optimizer", "spectra", "--use-mup"],
        "--use-mup with --optimizer spectra: its learning rates under muP are not known; leave it out",
    ),
    (
        ["--optimizer", "spectral_adam", "--spectral-tp-mode", "owner"],
        "--spectral-tp-mode owner with --optimizer spectral_adam: its averages stay with the shards; use",
    ),
    (["--fp8-format", "hybrid"], "cannot be rehearsed on the CPU"),
    (["--spectral-run-dir", "/dev/null"], "--spectral-run-dir /dev/null: cannot be made"),
    (["--qk-clip"], "--qk-clip with --optimizer sso: it scales weights of Q and K after the step"),
    (
        ["--rampup-batch-size", "2", "2", "8"],
        "--rampup-batch-size with --optimizer sso: Megatron does not read it",
    ),
    *(
        (["--load", ".", "--dist-ckpt-strictness", value], f"--dist-ckpt-strictness {value}: {why}")
        for value, why in (
            (
                "raise_all",
                "Megatron itself leaves entries of every checkpoint unread; use",
            ),
            ("return_unexpected", "is for programs that call Megatron; use log_unexpected"),
            ("return_all", "is for programs that call Megatron; use log_unexpected"),
        )
    ),
    (["--log-straggler"], "--log-straggler cannot be rehearsed on the CPU: it measures a GPU"),
    (["--log-device-memory-used"], "cannot be rehearsed on the CPU: it measures a GPU"),
    (["--record-memory-history"], "cannot be rehearsed on the CPU: it measures a GPU"),
    (
        ["--log-memory-to-tensorboard", "--tensorboard-dir", "tensorboard"],
        "--log-memory-to-tensorboard cannot be rehearsed on the CPU: it measures a GPU",
    ),
    (["--sft"], "--sft: this script trains on plain token streams"),
]


@pytest.mark.parametrize(("flags", "message"), ERRORS, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_one_clear_error_before_any_process_group(megatron: Megatron, flags, message) -> None:
    run = megatron.run(tiny(*flags), 2, calls=("probes:no_process_group",), fails=True)
    assert run.codes == [2, 2]
    errors = [line for line in run.log.splitlines() if "error: " in line]
    assert len(errors) == 1 and message in errors[0], run.log[-2000:]
    assert "Traceback" not in run.log
    assert not (run.folder / "process_group_was_made").exists()


def test_tied_embeddings_that_megatron_could_not_save(megatron: Megatron) -> None:
    """The second stage has a copy of the embedding for multi-token prediction; Megatron's save asserts."""
    argv = tiny("--mtp-num-layers", 1, "--pipeline-model-parallel-size", 2, "--save", "ckpt")
    argv.remove("--untie-embeddings-and-output-weights")
    run = megatron.run(argv, 2, calls=("probes:no_process_group",), fails=True)
    assert run.codes == [2, 2]
    assert run.log.count("tied embeddings: Megatron cannot save their copies; add --untie") == 1


@pytest.mark.parametrize("flags", [["--optimizer", "ssso"], ["--sso-momentum", "much"], ["--sso-rho", "1"]])
def test_what_argparse_refuses(megatron: Megatron, flags) -> None:
    run = megatron.run(tiny(*flags), fails=True, calls=("probes:no_process_group",))
    assert run.codes == [2]
    assert "error: " in run.log.splitlines()[-1] and flags[0] in run.log.splitlines()[-1]
    assert not (run.folder / "process_group_was_made").exists()


def assert_one_line(run: Run, message: str) -> None:
    """All ranks have ended with code 2, and the last thing said is one line."""
    assert set(run.codes) == {2}
    errors = [line for line in run.log.splitlines() if line.startswith("sso_megatron: error: ")]
    assert len(errors) == 1 and message in errors[0], run.log[-2000:]
    assert "Traceback" not in run.log


@pytest.mark.parametrize("sharded", [[], ["--use-distributed-optimizer"]], ids=["plain", "sharded"])
def test_a_pattern_that_matches_nothing(megatron: Megatron, sharded: list[str]) -> None:
    run = megatron.run(tiny("--spectral-exclude", "linear_qkw", *sharded), 2, fails=True)
    assert_one_line(
        run, "--spectral-exclude 'linear_qkw' matches no matrix of the model; names are such as d"
    )


@pytest.mark.parametrize("sharded", [[], ["--use-distributed-optimizer"]], ids=["plain", "sharded"])
def test_a_matrix_without_a_rule_names_itself(megatron: Megatron, sharded: list[str]) -> None:
    """An adapter that somebody added on one stage; the way out that the error names is one."""
    calls = ("probes:with_adapter",)
    argv = tiny("--pipeline-model-parallel-size", 2, *sharded)
    run = megatron.run(argv, 2, calls, fails=True)
    way_out = r"--spectral-exclude 'adapter\.weight' sends it to AdamW"
    assert_one_line(
        run, f"adapter.weight (8, 8): no rule says which matrices this parameter holds; {way_out}"
    )
    megatron.run([*argv, "--spectral-exclude", r"adapter\.weight"], 2, calls)


def test_records_of_two_runs_are_not_mixed(megatron: Megatron, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    run = megatron.run(tiny("--spectral-run-dir", tmp_path), fails=True)
    assert run.codes == [2]
    assert "holds the records of a run; name another, or go on with --load" in run.log


# What follows starts the module as users do.


def start(args: list[str], tmp_path: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.run(
        [sys.executable, "-m", *args], capture_output=True, text=True, cwd=tmp_path, env=environment
    )


@pytest.mark.slow
def test_an_unsupported_megatron_is_refused(tmp_path: Path) -> None:
    """Another version beside the user's script, as in a checkout of Megatron-LM, hides the wheel."""
    core = tmp_path / "checkout" / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("")
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 17\nPATCH = 1\n")
    (tmp_path / "checkout" / "pretrain_gpt.py").write_text("raise RuntimeError('it was started')")
    ended = start(["sso_megatron.run", "checkout/pretrain_gpt.py", *tiny()], tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "sso_megatron: error: megatron-core 0.17.1 cannot work: versions before 0.18 have no registry of "
        "emerging optimizers, through which the plugin enters; "
        "pip install 'megatron-core[training]==0.19.2'"
    )
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_missing_emerging_optimizers_is_named(tmp_path: Path) -> None:
    """A path hook hides the package and its metadata, as if it were not installed."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    ended = start(["sso_megatron.pretrain_gpt", *tiny()], tmp_path, PYTHONPATH=str(tmp_path))
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "sso_megatron: error: emerging-optimizers is not installed; "
        "pip install 'emerging-optimizers==0.3.0'"
    )
    assert "Traceback" not in ended.stderr


HIDE = """
import importlib.metadata, sys

sys.modules["emerging_optimizers"] = None
found = importlib.metadata.Distribution.from_name

def from_name(name):
    if name.replace("_", "-") == "emerging-optimizers":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.Distribution.from_name = from_name
"""


@pytest.mark.slow
def test_a_node_that_lost_its_gpu_does_not_rehearse(tmp_path: Path) -> None:
    """One node of two, and nobody hid the devices: without the error it would wait for the other."""
    node = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RANK": "1", "LOCAL_RANK": "0"}
    ended = start(["sso_megatron.pretrain_gpt", *tiny()], tmp_path, **node, CUDA_VISIBLE_DEVICES="7")
    assert ended.returncode == 2
    assert "one node of several; mend it, or rehearse on the CPU" in ended.stderr.splitlines()[-1]


def test_run_without_a_script(tmp_path: Path) -> None:
    ended = start(["sso_megatron.run", "missing.py"], tmp_path)
    assert ended.returncode == 2
    assert "no such script: 'missing.py'" in ended.stderr
    assert start(["sso_megatron.run"], tmp_path).returncode == 2
