"""``sso-megatron plot``: pictures of real runs, number by number."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from helpers.runs.records import lines, measured
from sso_megatron.cli.plot import axes as plot_axes
from sso_megatron.cli.plot import command as plot
from sso_megatron.cli.plot import layers as plot_layers
from sso_megatron.cli.plot import matrices as plot_matrices
from sso_megatron.cli.plot import report as plot_report
from sso_megatron.cli.plot import training as plot_training
from sso_megatron.runs.reader import load


def drawn(name: str, folders: list[Path]) -> Figure:
    picture = next(picture for picture in plot.PICTURES if picture.name == name)
    with plot_axes.look():
        figure = picture.draw(load(folders))
    assert figure is not None
    return figure


def panel(figure: Figure, title: str) -> Axes:
    (found,) = [a for a in figure.axes if (a.get_title() + a.get_title("left")).startswith(title)]
    return found


def curve(axis: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = [line for line in axis.lines if line.get_label() == label]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def edges(axis: Axes, number: int = 0) -> tuple[list[float], list[float]]:
    """Lower and upper limit of a band."""
    (path,) = axis.collections[number].get_paths()
    by_x: dict[float, list[float]] = {}
    for x, y in path.vertices:
        by_x.setdefault(float(x), []).append(float(y))
    return [min(ys) for _, ys in sorted(by_x.items())], [max(ys) for _, ys in sorted(by_x.items())]


def of_kind(rows: list[str], pattern: str) -> list[int]:
    found = [i for i, row in enumerate(rows) if re.search(pattern, row)]
    assert found
    return found


def test_loss_against_iterations_time_and_tokens(dense: Path, adam: Path) -> None:
    figure = drawn("loss", [dense, adam])
    by_iteration, by_time, by_tokens = figure.axes
    for folder in (dense, adam):
        records = lines(folder, "metrics.jsonl")
        started = json.loads((folder / "run.json").read_text())["started"]
        x, y = curve(by_iteration, folder.name)
        assert list(x) == [record["iteration"] for record in records]
        assert y == pytest.approx([record["loss"] for record in records])
        seconds, _ = curve(by_time, folder.name)
        assert by_time.get_xlabel() == "wall time, seconds"
        assert seconds == pytest.approx([record["time"] - started for record in records])
        tokens, _ = curve(by_tokens, folder.name)
        assert by_tokens.get_xlabel() == "tokens"
        assert list(tokens) == [4 * 32 * record["iteration"] for record in records]
    validation = json.loads((dense / "summary.json").read_text())["val_loss"]
    (star,) = [line for line in by_iteration.lines if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (6, validation)


KINDS = {
    "self_attention.linear_qkv.q": r"linear_qkv.*\[q\d+\]$",
    "self_attention.linear_qkv.v": r"linear_qkv.*\[v\d+\]$",
    "self_attention.linear_proj": r"linear_proj",
    "mlp.linear_fc1.gate": r"\[gate\]$",
}
VALUES: dict[str, tuple[str, Callable[[float], float]]] = {
    "norm_by_radius": ("radius_error", lambda error: error + 1),
    "spectral_norm": ("spectral_norm", float),
    "stable_rank": ("stable_rank", float),
    "update_ratio": ("update_ratio", float),
    "update_rms": ("update_rms", float),
    "lambda": ("lam", float),
    "residual": ("residual", abs),
    "nuclear_rank": ("nuclear_rank", float),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_kind_of_modules_has_its_median_and_limits(dense: Path, name: str) -> None:
    column, value = VALUES[name]
    rows, numbers = measured(dense, "matrices", column)
    figure = drawn(name, [dense])
    assert len(figure.axes) == 7
    for kind, pattern in KINDS.items():
        members = of_kind(rows, pattern)
        axis = panel(figure, f"{kind} ({len(members)})")
        wanted = np.array([[value(row[i]) for i in members] for row in numbers.values()])
        x, y = curve(axis, dense.name)
        assert list(x) == [2, 4, 6]
        assert y == pytest.approx(np.median(wanted, axis=1), rel=1e-5)
        low, high = edges(axis)
        assert low == pytest.approx(wanted.min(axis=1), rel=1e-5)
        assert high == pytest.approx(wanted.max(axis=1), rel=1e-5)


def test_what_is_drawn_beside_the_norms(dense: Path) -> None:
    """The radius, and how far a step can move a norm."""
    rows, steps = measured(dense, "matrices", "relative_step")
    members = of_kind(rows, KINDS["self_attention.linear_proj"])
    axis = panel(drawn("norm_by_radius", [dense]), "self_attention.linear_proj")
    largest = [max(row[i] for i in members) for row in steps.values()]
    dotted = [np.asarray(line.get_ydata()) for line in axis.lines if line.get_linestyle() == ":"]
    assert dotted[0] == pytest.approx(1 - np.array(largest), rel=1e-6)
    assert dotted[1] == pytest.approx(1 + np.array(largest), rel=1e-6)


def test_the_tolerance_is_that_of_bisection(dense: Path) -> None:
    (residual,) = [picture for picture in plot.PICTURES if picture.name == "residual"]
    (run,) = load([dense])
    for solver, wanted in (("tracking", []), ("bisection", [[2e-4, 2e-4]])):
        run.settings["solver"] = solver
        figure = residual.draw([run])
        assert figure is not None
        for axis in figure.axes:
            dotted = [line for line in axis.lines if line.get_linestyle() == ":"]
            assert [list(line.get_ydata()) for line in dotted] == wanted
        # One scale in all panels.
        assert len({(axis.get_yscale(), axis.get_ylim()) for axis in figure.axes}) == 1


def test_runs_of_different_optimizers_on_one_axis(dense: Path, moe: Path, spectra: Path) -> None:
    figure = drawn("spectral_norm", [dense, moe, spectra])
    axis = panel(figure, "self_attention.linear_proj")
    for folder in (dense, moe, spectra):
        rows, numbers = measured(folder, "matrices", "spectral_norm")
        members = of_kind(rows, "linear_proj")
        x, y = curve(axis, folder.name)
        assert list(x) == list(numbers)
        wanted = [np.median([row[i] for i in members]) for row in numbers.values()]
        assert y == pytest.approx(wanted, rel=1e-5)
    # Only one of them has experts: 4 in one layer.
    experts = panel(figure, "mlp.experts.linear_fc2 (4)")
    assert [line.get_label() for line in experts.lines] == [moe.name]
    (axis, *_) = drawn("spike_share", [dense, spectra]).axes
    assert [line.get_label() for line in axis.lines] == [spectra.name]
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {dense.name, moe.name, spectra.name}
    looks = [plot_axes.style(number) for number in range(3)]
    for what in ("color", "linestyle", "marker"):
        assert len({str(look[what]) for look in looks}) == 3
    markers = [line.get_marker() for line in panel(figure, "self_attention.linear_proj").lines]
    assert markers == [look["marker"] for look in looks]


def test_activations_over_training_and_by_layer(moe: Path) -> None:
    over, by_layer = drawn("activations", [moe]), drawn("activations_by_layer", [moe])
    for column, title in (("attention_max", "AbsMax, attention"), ("mlp_rms", "RMS, MLP")):
        rows, numbers = measured(moe, "layers", column)
        assert rows == ["decoder.layers.0", "decoder.layers.1"]
        x, y = curve(panel(over, title), moe.name)
        assert list(x) == [2, 4, 6]
        assert y == pytest.approx([np.mean(row) for row in numbers.values()], rel=1e-5)
        axis = panel(by_layer, title)
        for iteration in (2, 6):
            x, y = curve(axis, f"iteration {iteration}")
            assert list(x) == [0, 1]
            assert y == pytest.approx(numbers[iteration], rel=1e-5)


def test_logits_and_experts(moe: Path, dense: Path) -> None:
    for name, table, column in (("logits", "layers", "logit_max"), ("max_vio", "experts", "max_vio")):
        rows, numbers = measured(moe, table, column)
        over, by_layer = drawn(name, [moe]).axes
        _, y = curve(over, moe.name)
        assert y == pytest.approx([np.mean(row) for row in numbers.values()], rel=1e-5)
        x, y = curve(by_layer, moe.name)
        assert list(x) == [int(row.rpartition(".")[2]) for row in rows]
        assert y == pytest.approx(numbers[6], rel=1e-5)
    _, loads = measured(moe, "experts", "load")
    axis = panel(drawn("expert_load", [moe, dense]), f"{moe.name}, iteration 6")
    (image,) = axis.images
    assert np.asarray(image.get_array()) == pytest.approx(np.array(loads[6]), rel=1e-5)
    assert np.asarray(image.get_array()).sum() == pytest.approx(4, rel=1e-4)
    # max_vio is the busiest expert's load less the mean's.
    _, vio = measured(moe, "experts", "max_vio")
    assert max(loads[6][0]) - 1 == pytest.approx(vio[6][0], abs=1e-4)


def test_a_dead_expert_is_marked(moe: Path) -> None:
    run = load([moe])[0]
    (row,) = run.tables["experts"].last["load"]
    run.tables["experts"].last["load"][row] = [0.0, 2.0, 2.0, 0.0]
    figure = plot_layers.expert_load([run])
    assert figure is not None
    (crosses,) = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert list(crosses.get_xdata()) == [0, 3] and list(crosses.get_ydata()) == [0, 0]


def test_layers_of_multi_token_prediction_follow_the_decoder_s() -> None:
    rows = ["mtp.layers.0", "decoder.layers.3", "decoder.layers.1", "mtp.layers.1"]
    numbers, order = plot_layers._layers(rows)
    assert [rows[i] for i in order] == [rows[2], rows[1], rows[0], rows[3]]
    assert list(numbers) == [1, 3, 4, 5]


def test_names_that_matplotlib_would_read(tmp_path: Path) -> None:
    runs = []
    for name in ("_old", "a$b$c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0, "time": 1.0}\n')
        runs.append(tmp_path / name)
    figure = drawn("loss", runs)
    assert len(figure.legends[0].get_texts()) == 2
    with plot_axes.look():
        svg = plot_axes.svg_of(figure)
    assert ">a$b$c<" in svg and "_old<" in svg
    text = plot_report.element(plot_training.PICTURE, figure, svg)
    assert "_old from 2 to 2, a$b$c from 2 to 2" in text


def test_many_points_become_few() -> None:
    """Means of blocks between the smallest and the largest, up to the very last point."""
    x = np.arange(1, 1001)
    y = np.sin(x.astype(float))
    few, (low, middle, high) = plot_axes.thinned(x, np.stack([y - 1, y, y + 2]))
    size = 1000 // 150 + 1
    assert len(few) <= 150 and few[-1] == 1000
    assert middle[-1] == pytest.approx(y[-size:].mean())
    assert low[-1] == y[-size:].min() - 1 and high[-1] == y[-size:].max() + 2
    # A number that is missing leaves the mean of the others; where all are, there is none.
    y[1], y[-size:] = np.nan, np.nan
    _, (_, middle, _) = plot_axes.thinned(x, np.stack([y - 1, y, y + 2]))
    assert np.isnan(middle[-1]) and np.isfinite(middle[:-1]).all()
    first = np.nanmean(y[: 1000 % size or size])
    assert middle[0] == pytest.approx(first)
    # Rows without any number stay so, and do not spoil their neighbours.
    spread = plot_axes.spread_of(np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, np.inf]]))
    assert np.array_equal(spread, np.array([[1, np.nan, 3]] * 3), equal_nan=True)


def test_the_picture_of_a_first_run(dense: Path) -> None:
    path = plot_training.draw_run(dense)
    assert path == dense / "run.png" and Image.open(path).width > 1000
    figure = Figure()
    (run,) = load([dense])
    axis = figure.add_subplot()
    plot_matrices.draw_all_norms(axis, run)
    _, errors = measured(dense, "matrices", "radius_error")
    for label, which in (("largest", np.max), ("median", np.median), ("smallest", np.min)):
        wanted = [1 + which(row) for row in errors.values()]
        assert curve(axis, label)[1] == pytest.approx(wanted, rel=1e-6)
