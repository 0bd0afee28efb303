"""Other versions of Megatron-Core, from wheels that ``make wheels`` fetches: the same runs, by value."""

import ast
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from helpers.megatron_runs import MOE, Megatron, Run, assert_same_run, tiny, unpacked, zygote
from helpers.paths import PACKAGE
from sso_megatron.mcore.compat import versions
from sso_megatron.mcore.compat.private_names import PRIVATE_NAMES
from sso_megatron.mcore.errors import UnsupportedError

OTHERS = [v for v in versions.MEGATRON.tested if v != version("megatron-core")]
WATCH = ("probes:weights",)
BASE = ["--spectral-mup-init", "--train-iters", "4", "--clip-grad", "0.5"]
SHARDED = ["--use-distributed-optimizer"]


@pytest.fixture(scope="module", params=OTHERS)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Megatron]:
    base = tmp_path_factory.mktemp(f"megatron-{request.param}")
    folder = unpacked(request.param, base / "wheel")
    with zygote(base, folder) as started:
        started.version = request.param
        yield started


@pytest.fixture(scope="module")
def dense(megatron: Megatron) -> Run:
    return megatron.train(tiny(*BASE), calls=WATCH)


@pytest.fixture(scope="module")
def moe(megatron: Megatron) -> Run:
    return megatron.train(tiny(*MOE, *BASE), calls=WATCH)


@pytest.fixture(scope="module")
def plan(megatron: Megatron) -> str:
    return planned(megatron)


def planned(started: Megatron) -> str:
    """What ``sso-megatron plan`` writes for a model with experts over eight ranks."""
    flags = [*MOE, *SHARDED, "--expert-model-parallel-size", "2", "--sequence-parallel"]
    flags += ["--global-batch-size", "16"]
    argv = ["plan", *tiny(*flags, tp=2), "--world-size", "8", "--json", "plan.json"]
    return (started.run(argv, main="sso_megatron.cli.main:main").folder / "plan.json").read_text()


def test_cut_measured_and_resumed(other: Megatron, dense: Run) -> None:
    """TP 2 as one rank of the installed version; from its checkpoint on bit for bit."""
    argv = [*BASE, "--log-spectral-metrics", "2"]
    straight = other.train(tiny(*argv, "--save", "ckpt", "--save-interval", "2", tp=2), 2, WATCH)
    recorded = json.loads((straight.folder / "run.json").read_text())
    assert recorded["versions"]["megatron-core"] == other.version
    assert_same_run(straight, dense)
    assert straight.summary["max_radius_error"] < 1e-5
    measured = [json.loads(line) for line in (straight.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in measured if "headlines" in line] == [2, 4]
    assert all(line["headlines"]["logit_max"] > 0 for line in measured if "headlines" in line)
    load = ["--load", straight.folder / "ckpt", "--ckpt-step", "2"]
    second = other.train(tiny(*argv, *load, tp=2), 2, WATCH)
    assert second.losses == straight.losses[2:]
    for name, weight in straight.merged("final").items():
        assert weight.equal(second.merged("final")[name]), name


def test_sharded_experts(other: Megatron, moe: Run) -> None:
    """Two data-parallel ranks with the distributed optimizer, two of the experts each."""
    flags = [*SHARDED, "--expert-model-parallel-size", "2", "--micro-batch-size", "1"]
    assert_same_run(other.train(tiny(*MOE, *BASE, *flags), 2, WATCH), moe)


def test_plan(other: Megatron, plan: str) -> None:
    assert json.loads(planned(other)) == json.loads(plan)


def test_experts_with_a_tensor_parallelism_of_their_own(other: Megatron) -> None:
    """Their gradients are not summed in 0.18, so it is refused there."""
    if not other.version.startswith("0.18."):
        pytest.skip("0.19 sums them; test_distributed_optimizer.py")
    flags = [*MOE, *BASE, "--expert-tensor-parallel-size", "1", "--sequence-parallel"]
    run = other.run(tiny(*flags, tp=2), 2, fails=True)
    assert run.codes == [2, 2]
    said = "--expert-tensor-parallel-size 1 with --tensor-model-parallel-size 2: megatron-core 0.18"
    assert run.log.count(f"sso_megatron: error: {said}") == 1


def test_every_private_name_is_there(other: Megatron) -> None:
    (missing,) = other.run([], main="probes:missing_private_names").saved("missing")
    assert missing == []


def test_every_private_name_is_in_the_installed_version(megatron: Megatron) -> None:
    (missing,) = megatron.run([], main="probes:missing_private_names").saved("missing")
    assert missing == []


def private_uses(module: Path) -> list[str]:
    """What a module takes from Megatron that begins with an underscore, and what it puts there."""
    tree, imported, found = ast.parse(module.read_text(encoding="utf-8")), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron"):
            imported |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            imported |= {alias.asname for alias in node.names if alias.name.startswith("megatron")}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        is_private = node.attr.startswith("_") and not node.attr.endswith("__")
        is_taken = is_private or isinstance(node.ctx, ast.Store)
        if is_taken and isinstance(root, ast.Name) and root.id in imported:
            found.append(ast.unparse(node))
    for derived in ast.walk(tree):
        if not isinstance(derived, ast.ClassDef):
            continue
        bases = [base.id for base in derived.bases if isinstance(base, ast.Name) and base.id in imported]
        overridden = {f"{base}.{name}" for base in bases for name in private_super_calls(derived)}
        found += [name for name in overridden if not any(key.endswith(f":{name}") for key in PRIVATE_NAMES)]
    return found


def private_super_calls(derived: ast.ClassDef) -> set[str]:
    """Private methods of a base class that a class goes on to."""
    return {
        node.attr
        for node in ast.walk(derived)
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[^_].*", node.attr)
        if isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
    }


def test_private_names_are_used_through_their_table() -> None:
    modules = [module for room in ("mcore", "cli") for module in (PACKAGE / room).rglob("*.py")]
    assert {str(m.relative_to(PACKAGE)): uses for m in modules if (uses := private_uses(m))} == {}


def test_an_untested_version_is_told_and_tried(capsys: pytest.CaptureFixture[str]) -> None:
    versions._check("megatron-core", "0.20.0", versions.MEGATRON)
    versions._check("megatron-core", "0.20.0", versions.MEGATRON)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "sso_megatron: warning: megatron-core 0.20.0 was not tested, 0.18.0, 0.18.2, 0.19.0, 0.19.2 were;"
    )
    versions._check("emerging-optimizers", "0.4.0", versions.EMERGING)
    assert "emerging-optimizers 0.4.0 was not tested, 0.3.0 were" in capsys.readouterr().err


@pytest.mark.parametrize("found", ["0.18.2", "0.19.1", "0.19.7"])
def test_a_tested_minor_version_is_not_mentioned(capsys: pytest.CaptureFixture[str], found: str) -> None:
    versions._check("megatron-core", found, versions.MEGATRON)
    assert capsys.readouterr().err == ""


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"0\.17\.1 cannot work: .* no registry"):
        versions._check("megatron-core", "0.17.1", versions.MEGATRON)
    with pytest.raises(UnsupportedError, match=r"0\.1\.0 cannot work: versions before 0\.2 lack"):
        versions._check("emerging-optimizers", "0.1.0", versions.EMERGING)


def test_a_missing_private_name_is_one_line(megatron: Megatron) -> None:
    """As a version may be that nobody has tested yet."""
    run = megatron.run(tiny(), calls=("probes:without_a_private_name",), fails=True)
    assert run.codes == [2]
    said = (
        "megatron.core.optimizer has no _get_megatron_emerging_optimizer: megatron-core .* cannot work, 0"
    )
    assert re.search(f"^sso_megatron: error: {said}", run.log, re.MULTILINE)
