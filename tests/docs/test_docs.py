"""The documentation: blocks run, commands exist, flags parse."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.pages import PAGES, blocks
from helpers.paths import ROOT
from helpers.probes.command import execute
from helpers.processes import HANGS_AFTER

MEGATRON = {"-m sso_megatron.pretrain_gpt", "-m sso_megatron.run"}


def commands(page: Path) -> list[list[str]]:
    """Every shell command as a list of words; the added lines of a diff are commands, too."""
    lines = []
    for block in blocks(page, "bash", "console"):
        lines += block.replace("\\\n", " ").splitlines()
    for block in blocks(page, "diff"):
        lines += [line[1:] for line in block.splitlines() if line.startswith("+")]
    # What `xargs -0` gets from `render` is $FLAGS elsewhere.
    lines = [
        re.sub(r"^xargs -0 (.*)", r"\1 $FLAGS", part) for line in lines for part in re.split(r" \| +", line)
    ]
    commands = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in map(without_variables, commands) if words]


def without_variables(words: list[str]) -> list[str]:
    """A command without the ``NAME=value`` in front of it."""
    return list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]
PYTHON = [page for page in PAGES if blocks(page, "python")]


def test_every_fence_has_a_language_that_is_checked_or_plain() -> None:
    for page in PAGES:
        languages = re.findall(r"^```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(languages) % 2 == 0, f"{page}: a block is not closed"
        assert set(languages[::2]) <= {"python", "bash", "console", "diff", "yaml", ""}, page
        assert set(languages[1::2]) <= {""}, page


# ---------------------------------------------------------------- Python blocks


@pytest.mark.parametrize("page", PYTHON, ids=[str(p.relative_to(ROOT)) for p in PYTHON])
def test_python_blocks(page, megatron, tmp_path, monkeypatch, capsys) -> None:
    if any(re.search(r"megatron\.core|sso_megatron\.mcore", block) for block in blocks(page, "python")):
        # It makes process groups, redirects CUDA or adds to the table of optimizers: not in this process.
        megatron.run([str(page)], main="probes.command:execute_page")
        return
    monkeypatch.chdir(tmp_path)
    found = execute(page)
    RESULTS.get(page.name, check_losses)(found, capsys.readouterr().out.splitlines())


def check_losses(found: dict[str, Any], said: list[str]) -> None:
    losses = found["losses"]
    assert losses[-1] < 0.5 * losses[0], "the example learns"


def check_quickstart(found: dict[str, Any], said: list[str]) -> None:
    """The weight is printed on its sphere, and the fused one's matrices as the comment has them."""
    (_, norm, radius), names = said[0].split(), said[1]
    assert float(radius) == pytest.approx(2 * math.sqrt(64 / 96))
    assert float(norm) == pytest.approx(float(radius), rel=1e-3)
    assert f"# {names}\n" in (ROOT / "docs" / "quickstart.md").read_text() and len(said) == 2


def check_data(found: dict[str, Any], said: list[str]) -> None:
    """Tokens are as many as the files hold, two bytes each; what is loaded is what was prepared."""
    info = found["info"]
    assert said == [f"{info.tokens} {info.eod} {info.megatron_arguments()}"]
    for split in ("train", "valid", "test"):
        assert Path(f"data/stdlib_{split}.bin").stat().st_size == 2 * info.tokens[split] > 0


def check_monitoring(found: dict[str, Any], said: list[str]) -> None:
    """The function reads what a run writes, also where a resumed run has other rows."""
    from sso_megatron.runs.tables import Table
    from sso_megatron.runs.writer import RunFiles

    files = RunFiles(Path())
    for iteration, rows in ((1, ("a", "b")), (2, ("a", "b")), (3, ("b",))):
        x = np.array([iteration + 0.25, np.nan])[: len(rows)]
        files.append_measures(iteration, 0.0, 0.1, {"layers": Table(rows, {"x": x, "y": 2 * x})})
    assert found["measures"]("measures.jsonl") == {
        1: {"layers": {"a": {"x": 1.25, "y": 2.5}, "b": {"x": None, "y": None}}},
        2: {"layers": {"a": {"x": 2.25, "y": 4.5}, "b": {"x": None, "y": None}}},
        3: {"layers": {"b": {"x": 3.25, "y": 6.5}}},
    }


RESULTS = {"quickstart.md": check_quickstart, "data.md": check_data, "monitoring.md": check_monitoring}


# ---------------------------------------------------------------- commands


def first_run_flags(words: list[str]) -> list[str]:
    """Megatron's flags of ``sso-megatron first-run ...``; exits if the command itself is wrong."""
    from sso_megatron.cli.main import make_parser
    from sso_megatron.cli.train import first_run

    options = make_parser("first-run").parse_args(["first-run", *words])
    flags = first_run._flags(options.optimizer, options.iterations, Path("run"), 2)
    return [*flags, "--mock-data", *options.extra]


def make_variables(words: list[str]) -> tuple[list[str], dict[str, str]]:
    targets = [word for word in words if "=" not in word]
    return targets, dict(word.split("=", 1) for word in words if "=" in word)


def check_make(words: list[str]) -> None:
    targets, variables = make_variables(words)
    assert targets, "name a target"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in variables:
        assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"the Makefile has no {name}"
    # -n shows what would be done, and does nothing.
    result = subprocess.run(
        ["make", "-n", "-C", str(ROOT), *words],
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def check_sso_megatron(words: list[str]) -> None:
    """Run ``data``, and ``bench`` on less; what names files of an example, or ranks, is parsed alone."""
    from sso_megatron.cli.experiments import fragments as experiments
    from sso_megatron.cli.main import main, make_parser

    if words[0] == "first-run":
        first_run_flags(words[1:])
        return
    options, others = make_parser(words[0]).parse_known_args(words)
    if words[0] == "render" and others:
        experiments.read(others[0])
    elif words[0] != "plan":  # their other flags are Megatron's: test_flags_parse
        assert not others, others
    if words[0] == "bench" and options.tp == 1:
        small = shlex.split("--hidden 128 --layers 2 --repeats 2 --warmup 1")
        assert main([*words, *small]) == 0
    if getattr(options, "tokenizer", None) == "byte":
        assert main(words) == 0
        assert Path(f"{options.output}.json").is_file()


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    rest = " ".join(words[1:])
    assert not re.search(r"(?<![\w/])apex\b", rest), "apex on the package index is another package"
    for extra in re.findall(r"\.\[(\w+)\]", rest):
        assert re.search(rf'^        "{extra}": \[', (ROOT / "setup.py").read_text(), re.MULTILINE), extra


def check_script(words: list[str]) -> None:
    """``python docs/generate.py``, ``bash .ci/run``: the file is there. Dry runs are run."""
    assert (ROOT / words[0]).is_file()
    if "--dry-run" in words:
        env = os.environ | {"NPROC_PER_NODE": "8", "PYTHON": sys.executable}
        result = subprocess.run(
            ["bash", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert " -m sso_megatron.pretrain_gpt " in result.stdout


def launched(words: list[str]) -> tuple[str, list[str]]:
    """Experiment and flags behind ``launch/train.sh`` or a template, and options of theirs."""
    at = next(i for i, word in enumerate(words) if re.search(r"train\.sh$|\.sbatch$", word))
    experiment, *flags = itertools.dropwhile(lambda word: word.startswith("--"), words[at + 1 :])
    return experiment, flags


def check_launch(words: list[str]) -> None:
    """The experiment is there; its flags: test_flags_parse."""
    from sso_megatron.cli.experiments import fragments as experiments

    if "--dry-run" in words:
        check_script(["launch/train.sh", *words])
    experiments.read(launched(["launch/train.sh", *words])[0])


def check_sbatch(words: list[str]) -> None:
    """The template is there, and the points of a sweep are as many as its experiment has."""
    from sso_megatron.cli.experiments import fragments as experiments

    (template,) = [word for word in words if word.endswith(".sbatch")]
    assert (ROOT / template).is_file()
    experiment = experiments.read(launched(words)[0])
    for points in re.findall(r"--array=0-(\d+)", " ".join(words)):
        assert int(points) + 1 == len(experiment.points())


def check_elsewhere(words: list[str]) -> None:
    """What an installation of somebody else's software needs; not ours to try."""


CHECKS = {
    "make": check_make,
    "sso-megatron": check_sso_megatron,
    "pip": check_pip,
    "python": check_script,
    "bash": check_script,
    "git": check_elsewhere,
    "cd": check_elsewhere,
    "launch/train.sh": check_launch,
    "sbatch": check_sbatch,
    "torchrun": check_elsewhere,  # test_flags_parse and test_a_documented_run have them all
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page.name}: {shlex.join(words)[:50]}" for page, words in COMMANDS]
)
def test_commands(page, words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("README.md", "docs"):  # input files that data.md names
        (tmp_path / name).symlink_to(ROOT / name)
    assert words[0] in CHECKS, f"test_docs.py does not know {words[0]!r}; teach it"
    try:
        CHECKS[words[0]](words[1:])
    except (SystemExit, argparse.ArgumentError) as error:
        pytest.fail(f"{shlex.join(words)}: {error}")


# ---------------------------------------------------------------- Megatron's command line


def torchrun_flags(words: list[str]) -> tuple[int, list[str]]:
    """Number of ranks, and the flags behind our module (and the script of ``run``)."""
    line = " ".join(words)
    module = next((m for m in MEGATRON if f" {m} " in line), None)
    assert module, f"{line}: torchrun must start one of {', '.join(sorted(MEGATRON))}"
    before, after = line.split(f" {module} ")
    ranks = re.search(r"--nproc-per-node[ =](\d+)", before)
    assert ranks, f"{line}: say --nproc-per-node"
    flags = after.split(" ")
    if module.endswith(".run"):
        assert flags[0].endswith(".py"), f"{line}: run needs a script"
        flags = flags[1:]
    return int(ranks[1]), flags


def plan_flags(words: list[str]) -> tuple[int, list[str], bool]:
    """Number of ranks of a plan, Megatron's flags, and whether these are all that a run needs."""
    from sso_megatron.cli.main import make_parser

    options, others = make_parser("plan").parse_known_args(["plan", *words])
    given = [flag for flag in others if flag not in PLACEHOLDERS]
    return options.world_size or 1, given, given == others


def render_flags(words: list[str]) -> list[str]:
    """Megatron's flags behind the name of an experiment."""
    from sso_megatron.cli.main import make_parser

    return make_parser("render").parse_known_args(["render", *words])[1][1:]


PLACEHOLDERS = {"...", "$FLAGS"}


def megatron_command_lines() -> list[tuple[str, int, list[str], bool]]:
    """Where, number of ranks, flags, and whether these are all that a run needs."""
    found = []
    for page, words in COMMANDS:
        if words[0] == "torchrun":
            ranks, flags = torchrun_flags(words)
            given = [flag for flag in flags if flag not in PLACEHOLDERS]
            found.append((page.name, ranks, given, given == flags))
        elif words[:2] == ["sso-megatron", "plan"]:
            found.append((page.name, *plan_flags(words[2:])))
        elif words[:2] == ["sso-megatron", "render"]:
            found.append((page.name, 1, render_flags(words[2:]), False))
        elif words[0] in ("launch/train.sh", "sbatch"):
            found.append((page.name, 1, launched(words)[1], False))
        elif words[:2] == ["make", "pretrain"]:
            variables = make_variables(words[1:])[1]
            arguments = ["--optimizer", variables.get("OPTIMIZER", "sso")]
            arguments += shlex.split(variables.get("ARGS", ""))
            found.append((page.name, 2, first_run_flags(arguments), True))
    return found


def test_flags_parse(megatron) -> None:
    lines = megatron_command_lines()
    assert any(is_complete for *_, is_complete in lines)
    megatron.run([json.dumps(lines)], main="probes.command:parse_flags")


@pytest.mark.parametrize(
    "flags", [["--sso-no-such-flag", "1"], ["--optimizer", "ssso"], ["--sso-tangent", "sideways"]]
)
def test_wrong_flags_do_not_parse(megatron, flags) -> None:
    """The check above can fail."""
    lines = [("nowhere", 1, ["--optimizer", "sso", *flags], False)]
    run = megatron.run([json.dumps(lines)], main="probes.command:parse_flags", fails=True)
    assert run.codes != [0]


def test_experiments_render(megatron, tmp_path) -> None:
    """Every YAML block is an experiment; the first point of its sweep is rendered, if it has one."""
    texts = [block for page in PAGES for block in blocks(page, "yaml")]
    lines = []
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        lines.append([str(path), *(["--point", "0"] if "sweep:" in text else [])])
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    run = megatron.run([str(tmp_path / "lines.json")], main="probes.config:render")
    answers = json.loads((run.folder / "answers.json").read_text())
    assert [(code, said) for code, _, said in answers] == [(0, "")] * len(texts) and texts


@pytest.mark.slow
def test_a_documented_run(tmp_path: Path) -> None:
    """Every torchrun line on made-up data is run as it stands."""
    lines = [words for _, words in COMMANDS if words[0] == "torchrun" and "--mock-data" in words]
    assert lines
    for words in lines:
        result = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words[1:]],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=HANGS_AFTER,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        folder = tmp_path / words[words.index("--spectral-run-dir") + 1]
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["iterations"] == int(words[words.index("--train-iters") + 1])
        assert math.isfinite(summary["val_loss"])
        assert summary["last_loss"] < summary["first_loss"]
        assert summary["max_radius_error"] < 1e-4
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["iteration"] for record in records] == list(range(1, summary["iterations"] + 1))
        assert records[0]["loss"] == summary["first_loss"]
        assert "grad_norm" in records[-1]
