"""``sso-megatron patch``, and a patched Megatron: real runs of plain scripts, from unpacked wheels."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from helpers.megatron_runs import free_port, tiny, unpacked
from helpers.paths import ROOT, SCRIPTS, TESTS
from helpers.processes import HANGS_AFTER
from sso_megatron.cli.main import main
from sso_megatron.mcore.compat import versions

PATCHES = ROOT / "patches"
NAMES = ["0001-optimizers-of-installed-packages", "0002-their-names-for-optimizer"]
NAMES += ["0003-tags-on-master-weights", "0004-compiled-dataset-helpers"]

# An installed package that this project knows nothing of.
PLUGIN = '''
import torch

class NotedSGD(torch.optim.SGD):
    """Writes down what it finds on the master weights at each step."""

    steps = []

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        self.steps.append({p.optimizer_tags["name"]: (p.dtype, tuple(p.shape)) for p in params})
        torch.save(self.steps, "steps.pt")
        return super().step(closure)

def kwargs(config, model_chunks, pg_collection):
    for chunk in model_chunks:
        for name, param in chunk.named_parameters():
            param.optimizer_tags = {"name": name}
    return {"lr": config.lr}

def plug_in(registry):
    from megatron.core.optimizer.emerging_optimizers import EmergingOptimizerEntry

    registry["noted_sgd"] = EmergingOptimizerEntry(
        optimizer_cls=NotedSGD,
        init_state_fn=lambda optimizer, config=None: None,
        config_to_kwargs=kwargs,
        default_param_overrides={},
    )
'''


def patch(*words: object) -> int:
    return main(["patch", *map(str, words)])


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def states(capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[int, list[str]]:
    """Exit code of ``check`` and what it says of each patch."""
    capsys.readouterr()
    code = patch("check", folder)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("  ")[0] for line in lines] == NAMES
    return code, [line.partition("  ")[2].strip() for line in lines]


def install(folder: Path) -> None:
    """A package with an entry point, as pip would leave it."""
    info = folder / "noted_sgd-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "noted_sgd.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noted-sgd\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megatron.core.optimizers]\nnoted = noted_sgd:plug_in\n")


def runs(megatron: Path, base: Path, scripts: dict[str, list[str]]) -> dict[str, Path]:
    """Runs of a plain script with these flags, by name, with the Megatron in ``megatron``."""
    install(base / "site-packages")
    binaries = base / "bin"
    binaries.mkdir()
    (binaries / "make").write_text(f"#!/bin/sh\ntouch {base}/make_was_run\nexit 1\n")
    (binaries / "make").chmod(0o755)
    requests = []
    for name, flags in scripts.items():
        (base / name).mkdir()
        argv = [*flags, "--train-iters", "2", "--lr-warmup-iters", "0", "--spectral-run-dir", "."]
        requests.append([str(base / name), *argv])
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RANK": "0", "LOCAL_RANK": "0"}
    env |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port()), "PATH": f"{binaries}:{os.environ['PATH']}"}
    path = [str(megatron), str(base / "site-packages"), str(ROOT), str(TESTS), env.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / "patched_runs.py"), json.dumps(requests)],
        env=env | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert not (base / "make_was_run").exists()
    return {name: base / name for name in scripts}


def losses(run: Path) -> list[float]:
    log = (run / "log").read_text()
    assert (run / "metrics.jsonl").exists(), log[-3000:]
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_everything(folder: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check, apply, check, real runs, revert; the files are what they were."""
    before = hashes(folder)
    assert states(capsys, folder) == (1, ["not applied"] * 4)
    assert hashes(folder) == before
    assert patch("apply", folder) == 0
    assert states(capsys, folder) == (0, ["applied"] * 4)
    after = hashes(folder)
    changed = {name for name in before if after[name] != before[name]}
    assert after.keys() == before.keys() and len(changed) == 6
    assert patch("apply", folder) == 0
    assert hashes(folder) == after

    script, run = str(SCRIPTS / "their_pretrain.py"), str(ROOT / "sso_megatron" / "run.py")
    found = runs(
        folder,
        base,
        {
            "plain": [script, *tiny("--spectral-mup-init", "--sso-radius-scaler", 2.0, "--bf16")],
            "launched": [run, script, *tiny("--spectral-mup-init", "--sso-radius-scaler", 2.0, "--bf16")],
            "other": [script, *tiny("--bf16", optimizer="noted_sgd")],
        },
    )
    assert len(losses(found["plain"])) == 2
    assert losses(found["plain"]) == losses(found["launched"])
    recorded = json.loads((found["plain"] / "run.json").read_text())
    assert recorded["settings"]["radius_scaler"] == 2.0
    assert recorded["versions"]["megatron-core"] == versions.version_in(folder / "megatron" / "core")
    summary = json.loads((found["plain"] / "summary.json").read_text())
    assert summary["max_radius_error"] < 1e-2  # in bf16
    assert len(losses(found["other"])) == 2
    first, second = torch.load(found["other"] / "steps.pt")
    assert first == second
    assert {dtype for dtype, _ in first.values()} == {torch.float32}
    qkv = "module.module.decoder.layers.1.self_attention.linear_qkv.weight"
    assert first[qkv] == (torch.float32, (128, 64))

    assert patch("revert", folder) == 0
    assert states(capsys, folder) == (1, ["not applied"] * 4)
    assert hashes(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("version", versions.MEGATRON.tested)
def test_a_wheel(version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_everything(unpacked(version, tmp_path / "wheel"), tmp_path / "runs", capsys)


def test_the_main_branch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of the checkout that the user names, of the commit in patches/main/COMMIT."""
    named = os.environ.get("SSO_MEGATRON_LM")
    if not named:
        pytest.skip("SSO_MEGATRON_LM must name a Megatron-LM checkout of the commit in patches/main/COMMIT")
    shutil.copytree(Path(named, "megatron"), tmp_path / "lm" / "megatron")
    datasets = tmp_path / "lm" / "megatron" / "core" / "datasets"
    if not any(datasets.glob("helpers_cpp.*.so")):  # what `make` in that folder would compile
        wheel = unpacked(versions.MEGATRON.tested[-1], tmp_path / "wheel")
        for compiled in (wheel / "megatron" / "core" / "datasets").glob("helpers_cpp.*.so"):
            shutil.copy(compiled, datasets)
    check_everything(tmp_path / "lm", tmp_path / "runs", capsys)


# ---------------------------------------------------------------- the command


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return unpacked("0.19.2", tmp_path / "wheel")


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that must fail."""
    capsys.readouterr()
    assert patch(*words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    return line.removeprefix("sso-megatron patch: error: ")


def test_in_a_folder_of_another_repository(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There git leaves out, without a word, what its paths do not lead to from the repository's root."""
    before = hashes(wheel)
    assert patch("apply", wheel) == 0
    outside = hashes(wheel)
    inside = tmp_path / "repository" / "deeper" / "wheel"
    unpacked("0.19.2", inside)
    subprocess.run(["git", "init", "-q", str(tmp_path / "repository")], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "repository" / ".git"))  # as in a hook of it
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "repository"))
    assert patch("apply", inside) == 0
    assert hashes(inside) == outside != before
    assert states(capsys, inside)[0] == 0
    assert patch("revert", inside) == 0
    assert hashes(inside) == before


def test_in_a_checkout(wheel: Path) -> None:
    subprocess.run(["git", "init", "-q", str(wheel)], check=True)
    before = hashes(wheel / "megatron")
    assert patch("apply", wheel) == 0
    assert hashes(wheel / "megatron") != before
    assert patch("revert", wheel) == 0
    assert hashes(wheel / "megatron") == before


def test_what_was_interrupted_is_named_and_finished(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = unpacked("0.19.2", tmp_path / "done")
    before = hashes(wheel)
    assert patch("apply", done) == 0
    file = "megatron/training/__init__.py"
    shutil.copy(done / file, wheel / file)
    code, said = states(capsys, wheel)
    assert code == 1
    assert said[0] == (
        f"half applied; applied: {file}; not applied: megatron/core/optimizer/__init__.py "
        "megatron/core/optimizer/emerging_optimizers.py"
    )
    assert said[1:] == ["not applied"] * 3
    assert patch("apply", wheel) == 0
    assert hashes(wheel) == hashes(done)
    shutil.copy(unpacked("0.19.2", tmp_path / "fresh") / file, wheel / file)
    assert states(capsys, wheel)[1][0].startswith("half applied; ")
    assert patch("revert", wheel) == 0
    assert hashes(wheel) == before


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_local_changes_are_named_and_nothing_is_changed(
    wheel: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    if action == "revert":
        assert patch("apply", wheel) == 0
    file = wheel / "megatron" / "training" / "arguments.py"
    file.write_text(file.read_text().replace("'adaptive_muon'", "'adaptive_muon', 'mine'"))
    before = hashes(wheel)
    line = refused(capsys, action, wheel)
    assert "patches do not fit megatron/training/arguments.py (0002-their-names-for-optimizer)" in line
    assert line.startswith("nothing was changed: ") and "put back local changes" in line
    assert hashes(wheel) == before
    code, said = states(capsys, wheel)
    assert (code, said[1]) == (2, "does not fit: megatron/training/arguments.py")


def test_a_folder_without_megatron(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "check", tmp_path)
    assert line.startswith(f"{tmp_path} must hold megatron/core/package_info.py; name a Megatron-LM ")


def test_a_version_without_patches(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = wheel / "megatron" / "core" / "package_info.py"
    info.write_text(info.read_text().replace("MINOR = 19", "MINOR = 17"))
    assert refused(capsys, "apply", wheel) == (
        f"{wheel} holds megatron-core 0.17.2; there are patches for 0.18.x, 0.19.x, 0.20.x (the last is "
        "the main branch)"
    )


def test_patches_elsewhere(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the package was installed without its checkout."""
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr("sso_megatron.__file__", str(tmp_path / "site-packages" / "x" / "__init__.py"))
    assert "no folder patches/ beside the package" in refused(capsys, "check", wheel)
    assert patch("check", wheel, "--patches", PATCHES) == 1
    missing = tmp_path / "missing"
    assert f"--patches {missing} is no folder; " in refused(capsys, "check", wheel, "--patches", missing)
    (missing / "core_v0.19").mkdir(parents=True)
    assert "must hold the patches for megatron-core 0.19.2" in refused(
        capsys, "check", wheel, "--patches", missing
    )


def test_without_git(
    wheel: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert refused(capsys, "check", wheel) == "git must be installed; it applies the patches"


def test_a_folder_that_cannot_be_written() -> None:
    """In a process of a user who does not own it, where root runs the tests."""
    with tempfile.TemporaryDirectory() as base:
        wheel = unpacked("0.19.2", Path(base, "wheel"))
        Path(base).chmod(0o755)
        folder = wheel / "megatron" / "core" / "datasets"
        folder.chmod(0o555)
        before = hashes(wheel)
        child = os.fork()
        if child == 0:
            with Path(base, "said").open("w") as sys.stderr:
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setresgid(65534, 65534, 65534)
                    os.setresuid(65534, 65534, 65534)
                code = patch("apply", wheel)
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        folder.chmod(0o755)
        (line,) = Path(base, "said").read_text().splitlines()
        assert line.endswith(" must be writable, and its folder; nothing was changed")
        assert hashes(wheel) == before


# ---------------------------------------------------------------- the series themselves


@pytest.mark.parametrize("series", ["core_v0.18", "core_v0.19", "main"])
def test_a_series(series: str) -> None:
    """Same purposes in all; each file is changed by one patch, so that each can be checked by itself."""
    patches = sorted((PATCHES / series).glob("*.patch"))
    assert [path.stem for path in patches] == NAMES
    files = [re.findall(r"^\+\+\+ b/(.*)$", path.read_text(), re.MULTILINE) for path in patches]
    assert [len(names) for names in files] == [3, 1, 1, 1]
    assert len({name for names in files for name in names}) == 6


def test_the_readme_has_a_row_for_each_patch() -> None:
    page = (PATCHES / "README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `0")]
    assert [row.split("`")[1] for row in rows] == [name[:4] for name in NAMES]
    for row in rows:
        assert len(row.split(" | ")) == 5
    assert (PATCHES / "main" / "COMMIT").read_text().strip() in page
