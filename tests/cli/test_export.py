"""``sso-megatron export``: checkpoints of real runs in several layouts, exported by one process."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from helpers.comparisons import stored
from helpers.megatron_runs import MOE, Megatron, Run, expert_by_itself, tiny
from helpers.processes import HANGS_AFTER
from sso_megatron.cli import main as cli
from sso_megatron.cli.export import _write_safetensors
from sso_megatron.version import __version__

# A constant rate: the last update leaves weights well off their spheres.
SAVING = ["--spectral-mup-init", "--lr", 0.05, "--lr-decay-style", "constant", "--lr-warmup-iters", 0]
SAVING += ["--save", "checkpoint", "--save-interval", 2]


def export(megatron: Megatron, *flags: object, fails: bool = False) -> Run:
    """Export in a rank, where Megatron is imported already."""
    return megatron.run(["export", *map(str, flags)], fails=fails, main="probes.command:command")


def export_as_users_do(*flags: object) -> str:
    """Export in a process of its own; what it prints."""
    command = [sys.executable, "-m", "sso_megatron.cli.main", "export", *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, timeout=HANGS_AFTER)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    return ended.stdout


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.metadata()


def norm(matrix: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(matrix.double(), 2).item()


def mup_radius(matrix: torch.Tensor) -> float:
    return (matrix.size(0) / matrix.size(1)) ** 0.5


def assert_retracted(found: dict[str, torch.Tensor], trained: dict[str, Any], off: float) -> None:
    """Every matrix is on its sphere and parallel to the trained one, which was off by more than ``off``."""
    norms, angles, moves = [], [], []
    for name, weight in trained.items():
        assert found[name].shape == weight.shape and found[name].dtype == torch.float32
        radius = mup_radius(weight)
        norms.append(abs(norm(found[name]) / radius - 1))
        expected = weight.double() * (radius / norm(weight))
        angles.append((norm(found[name].double() - expected)) / radius)
        moves.append(abs(norm(weight) / radius - 1))
    print(f"on the sphere to {max(norms):.1e}, parallel to {max(angles):.1e}, was off by {max(moves):.1e}")
    assert max(norms) <= 1e-6
    assert max(angles) <= 1e-6
    assert max(moves) > off


@pytest.fixture(scope="module")
def dense(megatron: Megatron) -> Run:
    return megatron.train(tiny(*SAVING, tp=2), 2, ("probes:weights",))


@pytest.fixture(scope="module")
def exported(dense: Run) -> Path:
    """The dense run as a safetensors file."""
    said = export_as_users_do("--load", dense.folder / "checkpoint", "--out", dense.folder / "exported")
    assert re.fullmatch(
        r"\S+/exported: iteration 4, 24 matrices on their spheres in float32, which were off by up to "
        r"\S+ \(relative\)\n",
        said,
    )
    return dense.folder / "exported"


def test_cut_matrices_are_exported_whole(dense: Run, exported: Path) -> None:
    found, trained = tensors(exported), dense.merged("final")
    assert_retracted(found, trained, 1e-3)
    # What the training's own retraction gives, by its power iteration.
    for name, (weight, radius) in dense.merged("retracted").items():
        assert norm(found[name]) == pytest.approx(radius, rel=1e-6)
        assert norm(found[name] - weight) <= 1e-3 * radius


def test_other_parameters_are_exported_as_they_are(dense: Run, exported: Path) -> None:
    found, trained = tensors(exported), dense.merged("final")
    weights = stored(dense.folder / "checkpoint" / "iter_0000004")
    names = {
        "embedding.word_embeddings.weight": weights["embedding.word_embeddings.weight"],
        "output_layer.weight": weights["output_layer.weight"],
        "decoder.final_layernorm.weight": weights["decoder.final_layernorm.weight"],
    }
    for layer in (0, 1):
        of_layer = f"decoder.layers.{layer}."
        norms = "decoder.layers.self_attention."
        names[of_layer + "input_layernorm.weight"] = weights[f"{norms}linear_qkv.layer_norm_weight"][layer]
        names[of_layer + "pre_mlp_layernorm.weight"] = weights[
            "decoder.layers.mlp.linear_fc1.layer_norm_weight"
        ][layer]
        for which in ("q", "k"):
            name = f"self_attention.{which}_layernorm.weight"
            names[of_layer + name] = weights[f"decoder.layers.{name}"][layer]
    assert found.keys() == trained.keys() | names.keys()
    for name, weight in names.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


def test_metadata_says_what_it_is(exported: Path) -> None:
    found = metadata(exported)
    expected = {
        **{"num_layers": "2", "hidden_size": "64", "ffn_hidden_size": "96", "num_attention_heads": "4"},
        **{"iteration": "4", "optimizer": "sso", "radius_mode": "spectral_mup", "radius_scaler": "1.0"},
        **{"qkv_split": "head", "mlp_split": "gate_up", "padded_vocab_size": "128", "format": "pt"},
        "sso_megatron": __version__,
    }
    assert expected.items() <= found.items()
    mode = (exported / "model.safetensors").stat().st_mode
    assert mode & 0o666 == exported.stat().st_mode & 0o666, "readable by whom the folder is"
    assert [path.name for path in exported.parent.glob(".exported*")] == []


def test_experts_of_a_bfloat16_run_come_from_master_weights(megatron: Megatron) -> None:
    """Expert parallelism, grouped experts, bfloat16: its copies are 1e-3 off the masters."""
    flags = [*MOE, "--expert-model-parallel-size", 2, "--moe-grouped-gemm", "--bf16"]
    run = megatron.train(tiny(*SAVING, *flags), 2, ("probes:weights",))
    export(megatron, "--load", run.folder / "checkpoint", "--out", run.folder / "exported")
    trained = {expert_by_itself(name): weight for name, weight in run.merged("final").items()}
    assert sum("local_experts" in name for name in trained) == 4 * 3
    assert_retracted(tensors(run.folder / "exported"), trained, 1e-3)


def test_hybrid_stack_of_two_stages(megatron: Megatron) -> None:
    flags = ["--hybrid-layer-pattern", "*-|*-", "--pipeline-model-parallel-size", 2]
    run = megatron.train(tiny(*SAVING, *flags, "--train-iters", 2), 2, ("probes:weights",))
    export(megatron, "--load", run.folder / "checkpoint", "--out", run.folder / "exported")
    assert_retracted(tensors(run.folder / "exported"), run.merged("final"), 1e-3)


def test_settings_are_those_of_the_run(megatron: Megatron) -> None:
    """Fused matrices, excluded ones, another radius and iteration, rounded to bfloat16."""
    flags = ["--spectral-mlp-split", "whole", "--spectral-qkv-split", "component", "--spectral-exclude"]
    flags += [r"linear_proj\.", "--sso-radius-mode", "identity", "--sso-radius-scaler", 0.5]
    run = megatron.train(
        tiny(*SAVING, *flags, "--train-iters", 2, tp=2, optimizer="muon_sphere"), 2, ("probes:weights",)
    )
    out = run.folder / "exported"
    export(
        megatron, "--load", run.folder / "checkpoint", "--out", out, "--ckpt-step", 2, "--dtype", "bfloat16"
    )
    found, trained = tensors(out), run.merged("final")
    errors = []
    for name, weight in trained.items():
        if name.endswith("fc1.weight"):
            # The run stores gate and up of the first rank above those of the second.
            gate0, up0, gate1, up1 = weight.chunk(4)
            weight = torch.cat([gate0, gate1, up0, up1])
        assert found[name].dtype == torch.bfloat16
        expected = (weight.double() * (0.5 / norm(weight))).float()
        torch.testing.assert_close(found[name].float(), expected, rtol=2**-8, atol=0)
        errors.append(abs(norm(found[name]) / 0.5 - 1))
    print(f"bfloat16 is off the sphere by up to {max(errors):.1e}")
    assert max(errors) <= 1e-3
    proj = stored(run.folder / "checkpoint" / "iter_0000002")[
        "decoder.layers.self_attention.linear_proj.weight"
    ]
    for layer in (0, 1):
        name = f"decoder.layers.{layer}.self_attention.linear_proj.weight"
        assert name not in trained
        torch.testing.assert_close(found[name], proj[layer].bfloat16(), rtol=0, atol=0)


@pytest.fixture(scope="module")
def for_megatron(megatron: Megatron, dense: Run) -> Path:
    """The dense run as a checkpoint of Megatron's."""
    out = dense.folder / "megatron"
    export(megatron, "--load", dense.folder / "checkpoint", "--out", out, "--to", "megatron")
    return out


def test_megatron_loads_its_own_format_in_every_layout(
    megatron: Megatron, dense: Run, for_megatron: Path
) -> None:
    out = for_megatron
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert not [name for name in stored(out / "iter_0000004") if name.startswith("optimizer")]
    one = ["--train-iters", 1, "--lr", 1e-9, "--min-lr", 0, "--lr-warmup-iters", 0]
    runs = [
        megatron.train(tiny(*one, "--load", out, "--finetune")),
        megatron.train(tiny(*one, "--load", out, "--finetune", tp=2), 2),
        megatron.train(tiny(*one, "--load", out, "--finetune", "--bf16", tp=2), 2),
    ]
    original = tiny(*one, "--load", dense.folder / "checkpoint", "--finetune")
    reference = megatron.train(original, 1, ("probes.command:retract_before_training",))
    untouched = megatron.train(original)
    losses = [run.losses[0] for run in [*runs, reference, untouched]]
    print("losses", losses)
    assert losses[:2] == pytest.approx([losses[3]] * 2, rel=1e-5)
    assert losses[2] == pytest.approx(losses[3], rel=1e-2), "bfloat16"
    assert abs(losses[4] / losses[3] - 1) > 1e-4, "what retraction changes is larger than that"
    # The other way that Megatron has: the run's iteration counts on.
    going_on = ["--no-load-optim", "--no-load-rng", "--train-iters", 5, "--lr", 1e-9, "--min-lr", 0]
    run = megatron.train(tiny(*going_on, "--lr-warmup-iters", 0, "--load", out, tp=2), 2)
    assert run.summary["iterations"] == 5 and len(run.losses) == 1


def test_exporting_an_export_changes_nothing(
    megatron: Megatron, exported: Path, for_megatron: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    export(megatron, "--load", for_megatron, "--out", again)
    found = tensors(again)
    for name, weight in tensors(exported).items():
        torch.testing.assert_close(found[name], weight, rtol=2e-7, atol=0)


def test_other_optimizers_and_spheres_of_shards_are_refused(megatron: Megatron) -> None:
    saving = ["--save", "checkpoint", "--save-interval", 1, "--train-iters", 1, "--lr-warmup-iters", 0]
    adam = megatron.train(tiny(*saving, optimizer="adam"))
    blockwise = megatron.train(tiny(*saving, "--spectral-tp-mode", "blockwise", tp=2), 2)
    for run, message in (
        (adam, "was trained with --optimizer adam: only sso and muon_sphere hold weights on spheres"),
        (blockwise, "--spectral-tp-mode blockwise over 2 ranks in"),
    ):
        ended = export(
            megatron, "--load", run.folder / "checkpoint", "--out", run.folder / "out", fails=True
        )
        assert ended.codes == [2]
        (line,) = [line for line in ended.log.splitlines() if "error:" in line]
        assert line.startswith("sso-megatron export: error: ") and message in line
        assert not (run.folder / "out").exists()


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """A folder with what look like checkpoints of iterations 2 (torch_dist) and 4 (torch)."""
    (tmp_path / "iter_0000002").mkdir()
    for name in ("metadata.json", ".metadata"):
        (tmp_path / "iter_0000002" / name).touch()
    (tmp_path / "iter_0000004" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    yield tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    assert cli.main(["export", *map(str, flags)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sso-megatron export: error: ")
    return lines[0]


def test_errors(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folders / "out"
    line = error_of(capsys, "--load", folders / "nowhere", "--out", out)
    assert "nowhere must be a folder of checkpoints" in line and "name what --save named" in line
    line = error_of(capsys, "--load", folders / "iter_0000002", "--out", out)
    assert "must be a folder of checkpoints" in line
    line = error_of(capsys, "--load", folders, "--out", out, "--ckpt-step", 3)
    assert "iteration 3 must be one that" in line and line.endswith("holds: 2, 4")
    line = error_of(capsys, "--load", folders, "--out", out)
    assert "is of the format torch" in line and "--ckpt-convert-format torch_dist" in line
    line = error_of(capsys, "--load", folders, "--out", folders / "iter_0000002", "--ckpt-step", 2)
    assert "iter_0000002 must not exist" in line
    (folders / "latest_checkpointed_iteration.txt").write_text("7")
    line = error_of(capsys, "--load", folders, "--out", out)
    assert "iter_0000007" in line and "does not exist" in line and "2, 4" in line
    (folders / "latest_checkpointed_iteration.txt").unlink()
    line = error_of(capsys, "--load", folders, "--out", out)
    assert "choose one of its iterations, 2, 4, with --ckpt-step" in line
    assert not out.exists()


def test_large_models_are_parted(tmp_path: Path) -> None:
    weights = {f"w{i}": torch.randn(4, 4) for i in range(3)} | {"large": torch.randn(100, 4)}
    _write_safetensors(tmp_path, iter(weights.items()), {"format": "pt"}, limit=130)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"format": "pt", "total_size": sum(w.nbytes for w in weights.values())}
    assert index["weight_map"] == {
        **dict.fromkeys(("w0", "w1"), "model-00001-of-00003.safetensors"),
        "w2": "model-00002-of-00003.safetensors",
        "large": "model-00003-of-00003.safetensors",
    }
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            torch.testing.assert_close(opened.get_tensor(name), weights[name], rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 4


def test_radii_of_the_first_weights(megatron: Megatron) -> None:
    """``from_weights``: what the optimizer keeps is the only place that knows the radius."""
    flags = ["--sso-radius-mode", "from_weights", "--sso-radius-scaler", 1.5, "--sso-tangent", "none"]
    experts = [*MOE, "--moe-grouped-gemm", "--expert-model-parallel-size", 2]
    saving = [flag for flag in SAVING if flag != "--spectral-mup-init"]
    run = megatron.train(tiny(*saving, *flags, *experts, "--train-iters", 2), 2, ("probes:weights",))
    export(megatron, "--load", run.folder / "checkpoint", "--out", run.folder / "exported")
    found, initial = tensors(run.folder / "exported"), run.merged("initial")
    for name, (_, radius) in run.merged("retracted").items():
        assert norm(found[expert_by_itself(name)]) == pytest.approx(radius, rel=1e-6)
        assert radius == pytest.approx(1.5 * norm(initial[name]), rel=1e-3)


def test_radii_of_the_optimizer_are_read(megatron: Megatron) -> None:
    run = megatron.run([], main="probes.command:save_radii")
    assert run.saved("radii") == [{"a.weight[q0]": 2.5}]
