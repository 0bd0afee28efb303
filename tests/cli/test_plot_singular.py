"""``sso-megatron plot --weights``: singular values, against checkpoints that are read in another way."""

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.comparisons import stored
from helpers.megatron_runs import MOE, Megatron, Run, expert_by_itself, tiny
from sso_megatron.cli.plot import axes as plot_axes
from sso_megatron.cli.plot import singular as plot_singular
from sso_megatron.runs.reader import load

SAVING = ["--spectral-mup-init", "--lr", 0.05, "--save", "checkpoint", "--save-interval", 2]


@pytest.fixture(scope="module")
def dense(megatron: Megatron) -> Run:
    return megatron.train(tiny(*SAVING, "--log-spectral-metrics", 2, tp=2), 2, ("probes:weights",))


def values(megatron: Megatron, root: Path, pattern: str) -> dict[str, dict[int, torch.Tensor]]:
    run = megatron.run([str(root), pattern], main="probes.command:read_singular_values")
    found: dict[str, dict[int, torch.Tensor]] = torch.load(run.folder / "values.pt")
    return found


def svd(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svd(matrix.double()).S


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_every_checkpoint_of_a_run_with_cut_matrices(dense: Run, megatron: Megatron) -> None:
    """The files as torch reads them; and the last weights as the ranks had them."""
    found = values(
        megatron, dense.folder / "checkpoint", r"layers\.1\.(mlp|self_attention\.linear_(proj|qkv.*k))"
    )
    layer = "decoder.layers.1."
    names = ["mlp.linear_fc1.weight[gate]", "mlp.linear_fc1.weight[up]", "mlp.linear_fc2.weight"]
    names += [
        f"self_attention.linear_{what}" for what in ("proj.weight", "qkv.weight[k0]", "qkv.weight[k1]")
    ]
    assert found.keys() == {layer + name for name in names}
    for iteration in (2, 4):
        weights = stored(dense.folder / "checkpoint" / f"iter_000000{iteration}")
        for name in ("mlp.linear_fc2.weight", "self_attention.linear_proj.weight"):
            assert_same(found[layer + name][iteration], svd(weights[f"decoder.layers.{name}"][1]))
    last = dense.merged("final")
    for name, by_iteration in found.items():
        assert list(by_iteration) == [2, 4]
        assert_same(by_iteration[4], svd(last[name]))


@pytest.mark.parametrize("optimizer", ["spectra", "adam"])
def test_runs_without_spheres(megatron: Megatron, optimizer: str) -> None:
    """bf16, too: the master weights are read."""
    argv = tiny("--lr", 1e-2, "--bf16", "--save", "checkpoint", "--save-interval", 4, optimizer=optimizer)
    root = megatron.run(argv).folder / "checkpoint"
    found = values(megatron, root, r"layers\.0\.mlp\.linear_fc2|output_layer")
    assert found.keys() == {"decoder.layers.0.mlp.linear_fc2.weight", "output_layer.weight"}
    weights = stored(root / "iter_0000004")
    rounded = svd(weights["decoder.layers.mlp.linear_fc2.weight"][0])
    (exact,) = found["decoder.layers.0.mlp.linear_fc2.weight"].values()
    torch.testing.assert_close(exact, rounded, rtol=1e-2, atol=1e-2)
    assert not torch.equal(exact, rounded)


def test_experts(megatron: Megatron) -> None:
    root = megatron.train(tiny(*MOE, *SAVING), calls=("probes:weights",))
    found = values(megatron, root.folder / "checkpoint", r"experts\.3\.")
    last = {expert_by_itself(name): weight for name, weight in root.merged("final").items()}
    prefix = "decoder.layers.1.mlp.experts.local_experts.3."
    assert found.keys() == {
        f"{prefix}linear_fc{what}" for what in ("1.weight[gate]", "1.weight[up]", "2.weight")
    }
    for name, by_iteration in found.items():
        assert_same(by_iteration[4], svd(last[name]))


def test_what_is_drawn(dense: Run, megatron: Megatron) -> None:
    """Histograms that hold each value once, one above the other, and the radius."""
    found = values(megatron, dense.folder / "checkpoint", r"layers\.0\.mlp\.linear_fc2")
    with plot_axes.look():
        figure = plot_singular.draw(load([dense.folder]), [found])
    (axis,) = figure.axes
    (name,) = found
    assert axis.get_title() == name
    assert [label.get_text() for label in axis.get_yticklabels()] == ["2", "4"]
    ridges = [patch for patch in axis.patches if not patch.get_fill()]
    assert len(ridges) == 2
    heights = [patch.get_data().values - place for place, patch in enumerate(ridges)]
    counts = [np.histogram(found[name][n].numpy(), ridges[0].get_data().edges)[0] for n in (2, 4)]
    assert [count.sum() for count in counts] == [64, 64]
    for height, count in zip(heights, counts, strict=True):
        assert height == pytest.approx(0.9 * count / max(map(max, counts)))
    (line,) = axis.lines
    assert line.get_xdata()[0] == pytest.approx((64 / 96) ** 0.5)
    (run,) = load([dense.folder])
    run.tables["matrices"].columns["radius"][:] = np.nan
    assert not plot_singular.draw([run], [found]).axes[0].lines, "none is known"


def test_the_command(dense: Run, megatron: Megatron) -> None:
    """Two runs, the second of which is the first's twin elsewhere, without run.json."""
    twin = dense.folder / "twin"
    twin.mkdir()
    (twin / "metrics.jsonl").write_bytes((dense.folder / "metrics.jsonl").read_bytes())
    (twin / "checkpoint").symlink_to(dense.folder / "checkpoint")
    argv = ["plot", str(dense.folder), str(twin), "--weights", r"layers\.0\.mlp"]
    run = megatron.run(argv, main="probes.command:command")
    assert "report.html: " in run.log
    text = (run.folder / "plots" / "report.html").read_text()
    assert text.count("decoder.layers.0.mlp.linear_fc1.weight[gate]") >= 2
    assert (run.folder / "plots" / "singular_values.png").exists()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("no_such", "--weights 'no_such' is found in no matrix of"),
        ("linear", "--weights 'linear' is found in 24 matrices of"),
    ],
)
def test_patterns_that_do_not_fit(dense: Run, megatron: Megatron, pattern: str, message: str) -> None:
    argv = ["plot", str(dense.folder), "--weights", pattern]
    run = megatron.run(argv, fails=True, main="probes.command:command")
    assert run.codes == [2]
    (line,) = [line for line in run.log.splitlines() if line.startswith("sso-megatron plot: error: ")]
    assert message in line


def test_weights_that_are_not_finite(megatron: Megatron) -> None:
    argv = tiny(*SAVING[1:], "--no-check-for-nan-in-loss-and-grad", optimizer="adam")
    folder = megatron.train(argv, calls=("probes.command:spoil_a_weight",)).folder
    argv = ["plot", str(folder), "--weights", r"layers\.1\.mlp\.linear_fc2"]
    run = megatron.run(argv, fails=True, main="probes.command:command")
    assert run.codes == [2]
    (line,) = [line for line in run.log.splitlines() if line.startswith("sso-megatron plot: error: ")]
    assert "decoder.layers.1.mlp.linear_fc2.weight is not finite at iteration 2 of" in line


def test_checkpoints_of_another_format(megatron: Megatron, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint" / "iter_0000004" / "mp_rank_00"
    folder.mkdir(parents=True)
    (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("4")
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n')
    argv = ["plot", str(tmp_path), "--weights", "fc2"]
    run = megatron.run(argv, fails=True, main="probes.command:command")
    assert run.codes == [2]
    assert "iter_0000004 is of the format torch and must be torch_dist" in run.log
