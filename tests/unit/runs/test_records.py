"""A run's folder as arrays: of runs that were killed and resumed, and what is no run's folder."""

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.megatron_runs import Megatron, tiny
from sso_megatron.cli.main import main
from sso_megatron.cli.plot import command as plot
from sso_megatron.runs.reader import load


@pytest.fixture(scope="module")
def dense(megatron: Megatron) -> Path:
    return megatron.train(tiny("--log-spectral-metrics", 2, "--train-iters", 6)).folder


@pytest.fixture()
def spoilt(dense: Path, tmp_path: Path) -> Path:
    """The dense run as if it had been killed at iteration 6 and resumed from 4 with one matrix less."""
    metrics = (dense / "metrics.jsonl").read_text().splitlines()
    again = [line.replace('"loss": ', '"loss": 1') for line in metrics[4:]]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*metrics[:5], metrics[5][:20], *again]))
    head, *rest = (dense / "measures.jsonl").read_text().splitlines()
    names = json.loads(head)["tables"]
    fewer = json.loads(rest[2])
    fewer["matrices"] = {column: values[1:] for column, values in fewer["matrices"].items()}
    names["matrices"] = names["matrices"][1:]
    resumed = [json.dumps({"tables": names}), json.dumps(fewer)]
    (tmp_path / "measures.jsonl").write_text("\n".join([head, *rest, rest[0][:100], *resumed]))
    return tmp_path


def test_a_run_that_was_killed_and_resumed(
    spoilt: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,), (whole,) = load([spoilt]), load([dense])
    said = capsys.readouterr().err
    assert "metrics.jsonl, line 6 is not whole" in said and "measures.jsonl, line 5 is not whole" in said
    assert list(run.iterations) == [1, 2, 3, 4, 5, 6]
    assert list(run.loss[:4]) == list(whole.loss[:4])
    assert list(run.loss[4:]) == [float(f"1{loss}") for loss in whole.loss[4:]]
    table, wanted = run.tables["matrices"], whole.tables["matrices"]
    assert table.rows == wanted.rows
    norms = table.columns["spectral_norm"]
    assert np.isnan(norms[2, 0]) and np.isfinite(norms[:2]).all()
    assert np.array_equal(norms[2, 1:], wanted.columns["spectral_norm"][2, 1:])
    assert run.optimizer == "" and run.summary == {}
    for picture in plot.PICTURES:
        picture.draw([run])


def test_a_resumed_run_that_is_behind_its_old_end(dense: Path, tmp_path: Path) -> None:
    """Killed at 6 and resumed from 2: what came after is of another run, which nobody goes on with."""
    metrics = (dense / "metrics.jsonl").read_text().splitlines()
    again = json.loads(metrics[2]) | {"loss": 1.0}
    for line in ("[1]", '{"iteration": 1e400}', '{"iteration": null}'):  # no records
        metrics.append(line)
    (tmp_path / "metrics.jsonl").write_text("\n".join([*metrics, json.dumps(again)]) + "\n")
    measures = (dense / "measures.jsonl").read_text()
    (tmp_path / "measures.jsonl").write_text(measures)
    (tmp_path / "run.json").write_text('{"started": null}')
    (run,), (whole,) = load([tmp_path]), load([dense])
    assert list(run.iterations) == [1, 2, 3] and run.loss[2] == 1.0
    assert list(run.tables["matrices"].iterations) == [2]
    # Four again, with lists that the old part has at six.
    lists = {"tables": {"experts": ["a"]}}, {"iteration": 6, "experts": {"load": [[1, 2]]}}
    now = {"tables": {"experts": ["b"]}}, {"iteration": 4, "experts": {"load": [[3, 4]]}}
    (tmp_path / "metrics.jsonl").write_text("\n".join(metrics[:4]) + "\n")
    (tmp_path / "measures.jsonl").write_text(
        measures + "".join(json.dumps(x) + "\n" for x in (*lists, *now))
    )
    (run,) = load([tmp_path])
    assert run.tables["experts"].last == {"load": {"b": [3, 4]}}
    assert list(run.tables["layers"].iterations) == [2]
    assert list(whole.tables["layers"].iterations) == [2, 4, 6]


def test_names_tell_runs_apart(dense: Path, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        (tmp_path / parent / "run" / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n')
    runs = load([tmp_path / "a" / "run", tmp_path / "b" / "run", dense])
    assert [run.name for run in runs] == ["a/run", "b/run", dense.name]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere is no folder; name one that a run's --spectral-run-dir named"),
        (["empty"], "empty has no records, neither metrics.jsonl nor measures.jsonl"),
        (["run", "run/../run"], "run is given twice"),
        (["run", "--weights", "("], "--weights '(' must be a regular expression"),
        (["run", "--checkpoints", "c"], "say whose singular values with --weights"),
        (["run", "empty", "--weights", "q", "--checkpoints", "c"], "belongs to one run"),
        (["run", "--weights", "q"], "run/checkpoint must be a folder of checkpoints"),
        (
            ["saved", "--weights", "q"],
            "neither /gone, where saved has saved, nor saved/checkpoint is a folder",
        ),
    ],
)
def test_what_is_refused(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "empty", "saved"):
        (tmp_path / name).mkdir()
    for name in ("run", "saved"):
        (tmp_path / name / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n')
    (tmp_path / "saved" / "run.json").write_text('{"save": "/gone"}')
    assert main(["plot", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sso-megatron plot: error: ") and said.count("\n") == 1
    assert message in said
