"""The files of a run's folder, as they are written and as each of their readers reads them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from helpers.runs.run_folders import HEALTHY, append, begin, record, state_of
from sso_megatron.cli.main import main
from sso_megatron.runs.file_format import DESCRIPTION, MEASURES, METRICS, SUMMARY
from sso_megatron.runs.json_lines import by_iteration, read_lines, read_object
from sso_megatron.runs.json_numbers import array_of, array_text, json_text, number_of
from sso_megatron.runs.reader import load
from sso_megatron.runs.tables import Table
from sso_megatron.runs.writer import RunFiles

# ---------------------------------------------------------------- resumed lines

# The run is resumed at its last iteration, killed in a line, and resumed at 3; so 5, 6 and 7 are over.
PARTS = [(1, 2, 3, 4, 5), (5, 6), (3, 4)]
COUNTS = {1: 0, 2: 0, 3: 2, 4: 2}
"""For each iteration the part whose line counts."""


def loss(iteration: int, part: int) -> float:
    """Another one for each line, in numbers that float32 has exactly."""
    return iteration + part / 4


@pytest.fixture()
def resumed(tmp_path: Path) -> Path:
    metrics, measures = [], ['{"tables": {"layers": ["a"]}}']
    for part, iterations in enumerate(PARTS):
        for i in iterations:
            metrics.append(json.dumps(record(i, 10.0 * i, loss=loss(i, part), headlines=HEALTHY)))
            measures.append(json.dumps({"iteration": i, "layers": {"x": [loss(i, part)]}}))
        if part == 1:
            metrics.append('{"iteration": 7, "lo')
            measures.append('{"iteration": 7, "layers": {"x": [')
    (tmp_path / METRICS).write_text("\n".join(metrics) + "\n")
    (tmp_path / MEASURES).write_text("\n".join(measures) + "\n")
    return tmp_path


def test_all_readers_agree_on_a_run_that_was_resumed_twice(
    resumed: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {i: loss(i, part) for i, part in COUNTS.items()}
    found = by_iteration(read_lines(resumed / METRICS))
    assert {i: line["loss"] for i, line in found.items()} == wanted
    assert capsys.readouterr().err == f"{resumed / METRICS}, line 8 is not whole, and is left out\n"
    state = state_of(resumed)
    assert state.losses == list(wanted.items())
    assert state.num_resumes == 2 and state.iteration == 4
    (run,) = load([resumed])
    assert dict(zip(run.iterations, run.loss, strict=True)) == wanted
    # Without metrics.jsonl nothing but the lines of measures.jsonl says which of them count.
    alone = tmp_path_factory.mktemp("alone")
    (resumed / MEASURES).rename(alone / MEASURES)
    (measured,) = load([alone])
    for table in (run.tables["layers"], measured.tables["layers"]):
        assert dict(zip(table.iterations, table.columns["x"][:, 0], strict=True)) == wanted


def test_a_resumed_iteration_that_has_no_numbers(tmp_path: Path) -> None:
    """A loss and a table that it does not have again are those of the part before, and go."""
    append(tmp_path, record(1), record(2), record(2, loss=None))
    tables = {"layers": ["a"], "experts": ["a"]}
    measures = [{"tables": tables}, *({"iteration": i, "layers": {"x": [i]}} for i in (1, 2))]
    measures.append({"iteration": 2, "experts": {"y": [0.5]}})
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / MEASURES).write_text("".join(json.dumps(line) + "\n" for line in measures))
    assert [i for i, _ in state_of(tmp_path).losses] == [1]
    (run,), (measured,) = load([tmp_path]), load([alone])
    assert list(run.iterations) == [1, 2] and np.isnan(run.loss[1])
    assert list(measured.tables["layers"].iterations) == [1]
    assert list(measured.tables["experts"].iterations) == [2]


def test_a_run_that_is_watched_while_it_is_resumed(resumed: Path, tmp_path: Path) -> None:
    """A poll after every line ends where one of the whole file does."""
    watched = tmp_path / "watched"
    watched.mkdir()
    state = state_of(watched)
    resumes = []
    for line in (resumed / METRICS).read_text().splitlines(keepends=True):
        append(watched, line)
        state.poll()
        resumes.append(state.num_resumes)
    assert resumes == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert state.losses == state_of(resumed).losses


# ---------------------------------------------------------------- unfinished and unreadable files


@pytest.mark.parametrize("text", [None, "", '{"time": 1', "[1]", "null", "\x00" * 20, "\xff{"])
def test_an_object_that_is_not_there(tmp_path: Path, text: str | None) -> None:
    """Missing, unfinished, another value, and what a disk leaves of a file after a power cut."""
    for name in (DESCRIPTION, SUMMARY) if text is not None else ():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    append(tmp_path, record(1))
    assert read_object(tmp_path / SUMMARY) == {}
    (run,) = load([tmp_path])
    state = state_of(tmp_path)
    assert run.about == run.summary == state.about == state.summary == {}
    assert not state.has_ended and RunFiles(tmp_path).read_summary() == {}


def test_lines_of_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are left out like any unfinished line, and hide none of the others."""
    append(tmp_path, record(1))
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'\x00\x00\xff\xfe"\n')
    append(tmp_path, record(2))
    (run,) = load([tmp_path])
    assert list(run.iterations) == [1, 2]
    assert f"{METRICS}, line 2 is not whole" in capsys.readouterr().err


def test_run_json_while_it_is_written_again(tmp_path: Path) -> None:
    begin(tmp_path)
    state = state_of(tmp_path)
    (tmp_path / DESCRIPTION).write_text('{"optimizer": "s')
    state.poll()
    assert state.about["optimizer"] == "sso"


@pytest.mark.parametrize("name", [DESCRIPTION, SUMMARY])
def test_a_file_that_cannot_be_read_is_an_error(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report without what is recorded would be worse; and one line says why there is none."""
    append(tmp_path, record(1))
    (tmp_path / name).mkdir()
    for command in (["plot"], ["watch", "--once"]):
        assert main([*command, str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"sso-megatron {command[0]}: error: ") and said.count("\n") == 1
        assert name in said


def test_a_summary_that_cannot_be_read_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / SUMMARY).mkdir()
    files = RunFiles(tmp_path)
    assert files.read_summary() == {}
    files.write_summary({"time": 1.0})
    read, written = capsys.readouterr().out.splitlines()
    assert read.startswith(f"sso_megatron: records in {SUMMARY} not read: ")
    assert written.startswith(f"sso_megatron: records in {SUMMARY} not written: ")


# ---------------------------------------------------------------- numbers


def test_numbers_are_read_as_they_were_written() -> None:
    numbers = np.array([[0.1, math.nan, math.inf], [-math.inf, -2.0, 1e-30]])
    text = array_text(numbers)
    assert text == "[[0.1,null,1e999],[-1e999,-2,1e-30]]"
    for row, wanted in zip(json.loads(text), numbers, strict=True):
        assert np.array_equal(array_of(row), wanted, equal_nan=True)
    assert json_text({"a": [math.nan, -math.inf], "b": 1 / 3}) == (
        '{"a": [null, -1e999], "b": 0.3333333333333333}'
    )


def test_what_is_no_number() -> None:
    values = [1, 2.5, None, "3", [4], {}, 10**400]
    assert [number_of(value) for value in values] == [1.0, 2.5, None, None, None, None, None]
    found = array_of(values, np.float32)
    assert found.dtype == np.float32 and np.array_equal(found, [1, 2.5] + 5 * [np.nan], equal_nan=True)


def test_measurements_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Through the files; the rows of the second are others, and lists are kept of the last alone."""
    files = RunFiles(tmp_path)
    load_of = {"load": np.array([[1.0, 0.0]])}
    first = {"layers": Table(("a", "b"), {"x": np.array([1.5, np.inf])}), "experts": Table(("a",), load_of)}
    second = {"layers": Table(("b", "c"), {"x": np.array([np.nan, 4.0])})}
    files.append_measures(2, 0.0, 0.1, first)
    files.append_measures(4, 1.0, 0.1, second)
    (run,) = load([tmp_path])
    table = run.tables["layers"]
    assert table.rows == ["a", "b", "c"] and list(table.iterations) == [2, 4]
    wanted = [[1.5, np.inf, np.nan], [np.nan, np.nan, 4.0]]
    assert np.array_equal(table.columns["x"], wanted, equal_nan=True)
    assert run.tables["experts"].last == {"load": {"a": [1.0, 0.0]}}
    assert run.tables["matrices"].rows == []
