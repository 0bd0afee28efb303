"""``sso-megatron plot``: files of pictures, and the report in a real browser."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.browser import Browser
from helpers.runs.records import lines
from sso_megatron.cli.main import main
from sso_megatron.cli.plot import command as plot
from sso_megatron.cli.plot import report as plot_report
from sso_megatron.cli.plot import training as plot_training
from sso_megatron.runs.reader import load

ALL_NAMES = {picture.name for picture in plot.PICTURES}


def plotted(folders: list[Path], out: Path, *flags: str) -> set[str]:
    """What the command writes into ``out``."""
    assert main(["plot", *map(str, folders), "--output", str(out), *flags]) == 0
    return {path.name for path in out.iterdir()}


def test_a_single_run_s_pictures_are_in_its_folder(
    spectra: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", str(spectra), "--format", "png"]) == 0
    report = spectra / "plots" / "report.html"
    assert capsys.readouterr().out == f"{report}: 9 pictures of 1 run\n"
    there = {"loss", "spectral_norm", "stable_rank", "update_ratio", "update_rms", "spike_share"}
    there |= {"activations", "activations_by_layer", "logits"}
    files = {path.name for path in report.parent.iterdir()}
    assert files == {f"{name}.png" for name in there} | {"report.html"}
    for path in report.parent.glob("*.png"):
        image = Image.open(path)
        assert image.width >= 600 and len(image.convert("L").getcolors(256) or []) > 20, path


def test_the_report_in_a_browser(
    dense: Path, moe: Path, spectra: Path, tmp_path: Path, browser: Browser
) -> None:
    names = plotted([dense, moe, spectra], tmp_path / "out", "--format", "svg")
    svgs = {name.removesuffix(".svg") for name in names if name.endswith(".svg")}
    absent = {"clipped_share", "divided"}
    assert svgs == ALL_NAMES - absent and names - {f"{name}.svg" for name in svgs} == {"report.html"}
    path = tmp_path / "out" / "report.html"
    page = browser.open(path)
    assert page.messages == [] and page.requests == []
    assert page.dom.count('role="img"') == len(svgs)
    ids = re.findall(r'\sid="([^"]*)"', page.dom)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="#|url\(#)([^")]+)', page.dom)
    assert targets and set(targets) <= set(ids)
    for wanted in ("Settings that differ", "rank_ratio", "spectra", "Healthy:"):
        assert wanted in page.text
    losses = [json.loads((run / "summary.json").read_text())["last_loss"] for run in (dense, moe, spectra)]
    for loss in losses:
        assert f"{loss:.4g}" in page.text
    # What no run has recorded, and how to get it.
    assert "--optimizer spectral_adam" in page.text and "name matrices with --weights" in page.text
    shown = browser.screenshot(path, tmp_path / "shot.png", height=9000)
    grey = np.asarray(shown.convert("L"))
    # Everything is inside the page, and far down there are still pictures.
    assert (grey[:, -8:] > 250).all()
    assert (grey[5000:] < 200).sum() > 5000
    narrow = browser.screenshot(path, tmp_path / "narrow.png", width=500, height=3000)
    assert narrow.width == 500


def test_the_browser_notices(tmp_path: Path, browser: Browser) -> None:
    """The checks above can fail."""
    page = tmp_path / "page.html"
    page.write_text("<img src='http://example.com/a.png'><script>console.error('x'); missing()</script>")
    found = browser.open(page)
    assert len(found.messages) == 2 and found.requests == ["GET http://example.com/a.png"]


def test_alarms_in_the_report(moe: Path) -> None:
    (run,) = load([moe])
    run.alarms = [(i, f"decoder.layers.{i % 2}: logit {90 + i}.5 is above 50") for i in (2, 4, 5)]
    run.alarms.append((6, "<b>expert</b> 3 of decoder.layers.1 gets no tokens"))
    kinds = plot_report.alarms(run)
    assert [(kind.first, kind.last, kind.count) for kind in kinds] == [(2, 5, 3), (6, 6, 1)]
    assert kinds[0].text == "decoder.layers.0: logit 92.5 is above 50"
    figure = plot_training.loss([run])
    assert figure is not None
    (ticks,) = [line for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert list(ticks.get_xdata()) == [2, 4, 5, 6]


def test_hundreds_of_layers_and_thousands_of_matrices(dense: Path, tmp_path: Path) -> None:
    """Real measurements of two layers, repeated: the report stays small."""
    head, *rest = lines(dense, "measures.jsonl")
    names = head["tables"]

    def deeper(rows: list[str]) -> list[str]:
        found = []
        for k in range(100):
            found += [row.replace("layers.0", f"layers.{2 * k}") for row in rows if "layers.0" in row]
            found += [row.replace("layers.1", f"layers.{2 * k + 1}") for row in rows if "layers.1" in row]
        return found

    tables = {table: deeper(rows) for table, rows in names.items()}
    assert len(tables["layers"]) == 200 and len(tables["matrices"]) == 2400
    measures = [{"tables": tables}]
    for i in range(300):
        line = rest[i % 3] | {"iteration": i + 1}
        for table in ("matrices", "layers"):
            line[table] = {column: values * 100 for column, values in rest[i % 3][table].items()}
        measures.append(line)
    folder = tmp_path / "deep"
    folder.mkdir()
    with (folder / "measures.jsonl").open("w") as file:
        for line in measures:
            file.write(json.dumps(line) + "\n")
    plotted([folder], tmp_path / "out", "--format", "svg")
    assert (tmp_path / "out" / "report.html").stat().st_size < 3_000_000
