"""Packaging: metadata, versions, import contracts, the interpreter finder, the Makefile."""

import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers.paths import ROOT
from helpers.processes import HANGS_AFTER

PACKAGE = ROOT / "sso_megatron"
FINDER = ROOT / "launch" / "python.sh"


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py passes to setuptools now (the installed metadata may be older)."""
    import setuptools

    captured: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", captured.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return captured


def requirements(metadata: dict[str, Any]) -> dict[str, list[Requirement]]:
    groups = {"": metadata["install_requires"], **metadata["extras_require"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}


def constraints() -> dict[str, Version]:
    lines = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def test_no_dependency_is_named_apex(metadata: dict[str, Any]) -> None:
    # The PyPI package of that name is unrelated to NVIDIA's.
    names = {canonicalize_name(r.name) for group in requirements(metadata).values() for r in group}
    assert "megatron-core" in names
    assert "apex" not in names
    assert "apex" not in constraints()


def test_versions_agree(metadata: dict[str, Any]) -> None:
    version = runpy.run_path(str(PACKAGE / "version.py"))["__version__"]
    assert metadata["version"] == version
    assert importlib.metadata.version("sso-megatron") == version
    headings = re.findall(
        r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert headings[0] == version


def test_every_direct_dependency_is_pinned_within_its_range(metadata: dict[str, Any]) -> None:
    pins = constraints()
    groups = requirements(metadata)
    for requirement in groups[""] + groups["dev"]:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"tests/constraints.txt has no line for {name}"
        assert pins[name] in requirement.specifier, f"{name} {pins[name]} is not in {requirement}"


def test_every_folder_with_modules_is_packaged(metadata: dict[str, Any]) -> None:
    # A subpackage without __init__.py works from a checkout and is missing from the wheel.
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    assert set(metadata["packages"]) == {".".join(folder.parts) for folder in folders}
    assert (PACKAGE / "py.typed").is_file()
    assert "py.typed" in metadata["package_data"]["sso_megatron"]


def contracts() -> dict[str, dict[str, Any]]:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {contract["id"]: contract for contract in config["tool"]["importlinter"]["contracts"]}


def test_contracts_mention_every_subpackage() -> None:
    present = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert present, "no subpackage found"

    layers = {name for layer in contracts()["layers"]["layers"] for name in re.findall(r"\w+", layer)}
    assert present <= layers

    may_import_megatron = {"mcore", "cli"}
    for contract in ("megatron", "emerging-optimizers"):
        sources = set(contracts()[contract]["source_modules"])
        expected = {f"sso_megatron.{name}" for name in present - may_import_megatron}
        assert expected <= sources, contract


@pytest.mark.parametrize(
    ("module", "statement", "broken"),
    [
        ("cli/main.py", "import megatron.core, emerging_optimizers, torch.distributed", None),
        ("mcore/entry.py", "from megatron.core.optimizer import emerging_optimizers", None),
        ("parallel/batch.py", "import torch.distributed as dist", None),
        ("linalg/coefficients.py", "from emerging_optimizers import utils", None),
        ("linalg/symmetric.py", "from emerging_optimizers import triton_kernels", None),
        ("updates/sso.py", "from sso_megatron.linalg import coefficients", None),
        ("linalg/polar.py", "from sso_megatron import updates", "layers"),
        ("cli/main.py", "from sso_megatron import run", "layers"),
        ("matrices/qkv.py", "import sso_megatron.parallel", "layers"),
        ("parallel/batch.py", "import sso_megatron.matrices", "layers"),
        ("utils/misc.py", "import sso_megatron.version", "layers"),
        ("runs/tables.py", "from sso_megatron.mcore import errors", "layers"),
        ("mcore/errors.py", "from sso_megatron.mcore.compat import versions", "mcore"),
        ("mcore/flags/parser.py", "from sso_megatron.mcore.optimizer import chain", "mcore"),
        ("mcore/metrics/recorder.py", "from sso_megatron.mcore.plan import records", "mcore"),
        ("mcore/extra.py", "import sso_megatron.version", "mcore"),
        ("cli/shared/pages.py", "from sso_megatron.cli.plan import text", "cli"),
        ("cli/plot/report.py", "from sso_megatron.cli import export", "cli"),
        ("runs/reader.py", "import megatron.core", "megatron"),
        ("optimizers/sso.py", "def f():\n    import megatron.core", "megatron"),
        ("parallel/batch.py", "from megatron.core import mpu", "megatron"),
        ("linalg/coefficients.py", "import megatron.core", "megatron"),
        ("linalg/polar.py", "import emerging_optimizers", "emerging-optimizers"),
        ("parallel/batch.py", "import emerging_optimizers.utils", "emerging-optimizers"),
    ],
)
def test_contracts_catch(tmp_path: Path, module: str, statement: str, broken: str | None) -> None:
    stub = tmp_path / "sso_megatron"
    for path in [*PACKAGE.rglob("*.py"), PACKAGE / Path(module).parent / "__init__.py"]:
        copy = stub / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    for exception in ("coefficients", "symmetric"):
        (stub / "linalg" / f"{exception}.py").write_text("import emerging_optimizers\n")
    with (stub / module).open("a") as file:
        file.write(f"{statement}\n")
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)

    # In the process of this test the package is the real one, hence another process and folder.
    result = subprocess.run(
        [f"{sysconfig.get_path('scripts')}/lint-imports", "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )
    names = {c["id"]: c["name"] for c in contracts().values()}
    printed = " ".join(result.stdout.split())  # long names are wrapped
    reported = {key for key, name in names.items() if f"{name} BROKEN" in printed}
    assert reported == ({broken} if broken else set()), result.stdout + result.stderr
    assert (result.returncode == 0) == (broken is None)


@pytest.mark.parametrize(
    ("path", "statement", "caught"),
    [
        ("sso_megatron/optimizers/sso.py", "import torch.distributed as dist", True),
        ("sso_megatron/updates/sso.py", "from torch import distributed", True),
        ("sso_megatron/matrices/qkv.py", "import torch\n\ntorch.distributed.barrier()", True),
        ("sso_megatron/linalg/polar.py", "from emerging_optimizers import utils", True),
        ("sso_megatron/optimizers/sso.py", "from megatron.core import mpu", True),
        ("sso_megatron/linalg/coefficients.py", "from emerging_optimizers import utils", False),
        ("sso_megatron/linalg/symmetric.py", "from emerging_optimizers import utils", False),
        ("sso_megatron/parallel/batch.py", "import torch.distributed as dist", False),
        ("sso_megatron/mcore/entry.py", "import megatron.core", False),
        ("sso_megatron/cli/main.py", "import megatron.core", False),
        ("tests/test_parallel.py", "import torch.distributed as dist", False),
    ],
)
def test_ruff_catches_banned_imports(path: str, statement: str, caught: bool) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select=TID251"]
    result = subprocess.run(
        [*command, f"--stdin-filename={path}", "-"],
        input=f"{statement}\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )
    assert result.returncode == int(caught), result.stdout + result.stderr
    assert ("TID251" in result.stdout) == caught


# ---- launch/python.sh


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def run_finder(**env: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, str(FINDER)], env=env, capture_output=True, text=True, timeout=HANGS_AFTER, check=False
    )


def version_of(interpreter: str) -> tuple[int, int]:
    code = "import sys; print(*sys.version_info[:2])"
    output = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
    major, minor = output.stdout.split()
    return int(major), int(minor)


def test_finder_skips_a_broken_shim_and_finds_the_next(tmp_path: Path) -> None:
    script(tmp_path / "shims" / "python3.12", "echo 'not selected' >&2; exit 127")
    script(tmp_path / "bin" / "python3.12", f'exec "{sys.executable}" "$@"')
    result = run_finder(PATH=f"{tmp_path}/shims:{tmp_path}/bin", HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (3, 12) <= version_of(result.stdout.strip()) == sys.version_info[:2]
    # Not the virtual environment that the tests run in: .venv is made from what is printed.
    if sys.prefix != sys.base_prefix:
        assert not Path(result.stdout.strip()).is_relative_to(sys.prefix)


def test_finder_looks_in_pyenv(tmp_path: Path) -> None:
    interpreter = tmp_path / ".pyenv" / "versions" / "3.13.7" / "bin" / "python3.13"
    script(interpreter, f'exec "{sys.executable}" "$@"')
    (tmp_path / "empty").mkdir()
    result = run_finder(PATH=f"{tmp_path}/empty", HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert version_of(result.stdout.strip()) == sys.version_info[:2]


def test_finder_lets_uv_install_one(tmp_path: Path) -> None:
    script(
        tmp_path / "bin" / "uv",
        f"""
        case "$1 $2" in
            "python find") [[ -e {tmp_path}/installed ]] && echo "{sys.executable}" ;;
            "python install") echo "installing $3"; : > {tmp_path}/installed ;;
            *) exit 2 ;;
        esac""",
    )
    result = run_finder(PATH=f"{tmp_path}/bin", HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert "installing 3.12" in result.stderr


def test_finder_without_any_python_says_what_to_do(tmp_path: Path) -> None:
    result = run_finder(PATH=str(tmp_path), HOME=str(tmp_path))
    assert result.returncode == 1
    assert result.stdout == ""
    for help_line in ("apt-get install python3", "pyenv install 3.12", "uv", "PYTHON=/path/to/"):
        assert help_line in result.stderr


def test_finder_names_the_missing_debian_package(tmp_path: Path) -> None:
    script(tmp_path / "python3.13", "echo 3.13; exit 4")  # the probe's answer without ensurepip
    result = run_finder(PATH=str(tmp_path), HOME=str(tmp_path))
    assert result.returncode == 1
    assert "apt-get install python3.13-venv" in result.stderr


def test_finder_does_not_look_past_a_bad_override(tmp_path: Path) -> None:
    script(tmp_path / "python3.12", f'exec "{sys.executable}" "$@"')
    old = script(tmp_path / "old", "exit 3")  # the probe's answer from another version
    result = run_finder(PATH=str(tmp_path), HOME=str(tmp_path), PYTHON=str(old))
    assert result.returncode == 1
    assert result.stdout == ""
    assert f"PYTHON={old}" in result.stderr


# ---- Makefile, with an interpreter that only pretends to install


# It answers the finder's probe, makes a .venv of itself, and "installs" a console script that
# prints the JSON of the optimizer's name, its third argument.
FAKE_PYTHON = r"""
case "$1 $2" in
    "-I -c") echo "$0" ;;
    "-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip")
        echo "noise of pip $3"
        if [[ $3 != install ]]; then exit 0; fi
        if [[ -n ${FAIL_INSTALL:-} ]]; then exit 1; fi
        printf '%s\n' '#!/bin/sh' 'echo training' 'echo "\"$3\""' > .venv/bin/sso-megatron
        chmod +x .venv/bin/sso-megatron ;;
esac
"""
MAKE_INPUTS = [
    "Makefile",
    "launch/python.sh",
    "setup.py",
    "pyproject.toml",
    "tests/constraints.txt",
    "sso_megatron/version.py",
]


def make(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    for name in MAKE_INPUTS:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    python = script(folder / "python", FAKE_PYTHON)
    # Nothing of a make that runs these tests: its flags, and the variables on its command line.
    outer = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "ARGS", "OPTIMIZER", "PYTHON"}
    inherited = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        ["make", f"PYTHON={python}", *arguments],
        cwd=folder,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )


def test_pretrain_sets_up_by_itself_and_ends_with_json(tmp_path: Path) -> None:
    result = make(tmp_path, "-j4", "pretrain", "OPTIMIZER=muon_sphere")
    assert result.returncode == 0, result.stderr
    assert "noise of pip install" in result.stderr
    assert result.stdout.splitlines()[0] == "training"
    assert json.loads(result.stdout.splitlines()[-1]) == "muon_sphere"

    again = make(tmp_path, "pretrain")
    assert "noise" not in again.stderr, "an up-to-date environment was installed again"
    os.utime(tmp_path / "tests" / "constraints.txt")
    refreshed = make(tmp_path, "pretrain")
    assert "noise of pip install" in refreshed.stderr
    assert "Creating" not in refreshed.stderr, "a working environment was made anew"


def test_failed_install_leaves_no_stamp(tmp_path: Path) -> None:
    failed = make(tmp_path, "pretrain", FAIL_INSTALL="1")
    assert failed.returncode != 0
    assert not (tmp_path / ".venv" / ".installed").exists()
    assert make(tmp_path, "pretrain").returncode == 0
