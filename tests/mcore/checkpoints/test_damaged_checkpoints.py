"""Checkpoints that cannot be loaded: one line that names the file or key, exit code 2 on every rank."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.megatron_runs import MOE, Megatron, Run, tiny
from sso_megatron.mcore.checkpoint.compatibility import drop_missing_optional
from sso_megatron.mcore.checkpoint.folders import MANIFEST, TRACKER
from sso_megatron.mcore.parameters.names import OPTIONAL_STATE

LENGTH = ("--train-iters", 6)


def save(megatron: Megatron, *flags: object, optimizer: str = "sso") -> Path:
    """A folder with checkpoints of iterations 2 and 4."""
    argv = tiny(
        "--save", "ckpt", "--save-interval", 2, *LENGTH, "--exit-interval", 4, *flags, optimizer=optimizer
    )
    return megatron.run(argv, 2).folder / "ckpt"


@pytest.fixture(scope="module")
def sound(megatron: Megatron) -> Path:
    return save(megatron)


@pytest.fixture(scope="module")
def adam(megatron: Megatron) -> Path:
    return save(megatron, optimizer="adam")


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "ckpt")


def load(root: Path, *flags: object, optimizer: str = "sso") -> list[str]:
    return tiny("--load", root, *LENGTH, *flags, optimizer=optimizer)


def assert_refused(megatron: Megatron, argv: list[str], message: str, calls: tuple[str, ...] = ()) -> Run:
    """Both ranks leave by themselves, and one line says why.

    A rank that waited for one that has left would do so for Megatron's ten minutes.
    """
    run = megatron.run(argv, 2, calls, fails=True, grace=300)
    assert run.codes == [2, 2], f"{run.codes}\n{run.log[-4000:]}"
    lines = [line for line in run.log.splitlines() if line.startswith("sso_megatron: error:")]
    assert len(lines) == 1, lines
    print(lines[0])
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in run.log
    return run


def assert_loads(megatron: Megatron, argv: list[str], iteration: int, calls: tuple[str, ...] = ()) -> Run:
    run = megatron.run([*argv, "--spectral-run-dir", "."], 2, calls)
    first = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["iteration"] == iteration + 1
    return run


# ---------------------------------------------------------------- files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


WAY_OUT = r"; restore it, or load another checkpoint with --ckpt-step 2$"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("__0_0.distcp", cut, r"is damaged: its \d+ bytes are not those that were saved"),
        ("__1_0.distcp", flip_a_bit, r"is damaged: its \d+ bytes are not those that were saved"),
        (".metadata", cut, r"is damaged: its \d+ bytes are not those that were saved"),
        ("metadata.json", Path.unlink, "is missing"),
        ("__1_0.distcp", Path.unlink, "is missing"),
        (MANIFEST, cut, "is damaged: it is no manifest"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", None),
)
def test_a_damaged_file(
    megatron: Megatron, damaged: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    damage(damaged / "iter_0000004" / name)
    assert_refused(megatron, load(damaged), rf"iter_0000004/{re.escape(name)} {said}{WAY_OUT}")


def test_the_way_out_of_a_damaged_file(megatron: Megatron, damaged: Path) -> None:
    cut(damaged / "iter_0000004" / "__1_0.distcp")
    assert_loads(megatron, [*load(damaged), "--ckpt-step", "2"], iteration=2)
    assert_refused(
        megatron, [*load(damaged), "--ckpt-step", "3"], "--ckpt-step 3: .* is not there; .*: 2, 4$"
    )


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_damaged_file_without_manifest(megatron: Megatron, damaged: Path, name: str) -> None:
    """As plain Megatron leaves it: found when it is read, if at all, but still one line."""
    folder = damaged / "iter_0000004"
    (folder / MANIFEST).unlink()
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    run = megatron.run(load(damaged), 2, fails=True, grace=60)
    assert run.codes == [2, 2], run.log[-3000:]
    assert run.log.count("sso_megatron: error:") == 1
    assert "--ckpt-step 2" in run.log


def test_a_damaged_file_when_arguments_are_read(megatron: Megatron, damaged: Path) -> None:
    """There is no process group yet."""
    cut(damaged / "iter_0000004" / ".metadata")
    assert_refused(megatron, load(damaged, "--use-checkpoint-args"), r"/\.metadata is damaged")


def test_a_truncated_file_of_the_old_format(megatron: Megatron) -> None:
    root = save(megatron, "--ckpt-format", "torch")
    cut(root / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt")
    assert_refused(
        megatron,
        load(root, "--ckpt-format", "torch"),
        r"iter_0000004/mp_rank_00/model_optim_rng\.pt cannot be read .*--ckpt-step 2$",
    )


def test_what_loads(megatron: Megatron, damaged: Path) -> None:
    """Without a manifest, and with a lost tracker: with a process group, and before there is one."""
    (damaged / "iter_0000004" / MANIFEST).unlink()
    for flags in ([], ["--use-checkpoint-args"]):
        (damaged / TRACKER).unlink()
        run = assert_loads(megatron, load(damaged, *flags), iteration=4)
        assert run.log.count(f"{TRACKER} is missing; it now names iteration 4") == 1


def test_megatrons_own_verification_reads_the_manifest(megatron: Megatron, sound: Path) -> None:
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    verify_integrity_manifest(str(sound / "iter_0000004"))
    assert_loads(megatron, load(sound, "--verify-integrity"), iteration=4)


@pytest.mark.parametrize("flags", [["--finetune"], ["--no-load-optim"], ["--no-load-rng"]])
def test_what_is_loaded_can_be_chosen(megatron: Megatron, sound: Path, flags: list[str]) -> None:
    assert_loads(megatron, load(sound, *flags), iteration=0 if flags == ["--finetune"] else 4)


# ---------------------------------------------------------------- contents


def rewrite_metadata(folder: Path, key: str) -> None:
    """Take a key out of a checkpoint without a manifest."""
    (folder / MANIFEST).unlink()
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    del metadata.state_dict_metadata[key]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("key", "way_out"),
    [
        ("decoder.final_layernorm.weight", "it is of another model; load it with the flags"),
        ("optimizer.state.exp_avg.decoder.final_layernorm.weight", "add --no-load-optim"),
    ],
)
def test_a_missing_key(megatron: Megatron, damaged: Path, key: str, way_out: str) -> None:
    rewrite_metadata(damaged / "iter_0000004", key)
    assert_refused(megatron, load(damaged), rf"iter_0000004 does not hold {re.escape(key)}; {way_out}")


@pytest.mark.parametrize(
    ("flags", "then", "now", "shapes"),
    [
        (
            ["--hidden-size", 128],
            "--hidden-size 64",
            "--hidden-size 128",
            r"\(2, 64\) in it and \(2, 128\) in this run",
        ),
        (
            ["--num-layers", 4],
            "--num-layers 2",
            "--num-layers 4",
            r"\(2, .*\) in it and \(4, .*\) in this run",
        ),
        (["--ffn-hidden-size", 160], "--ffn-hidden-size 96", "--ffn-hidden-size 160", "linear_fc"),
        (["--vocab-size", 300], "--vocab-size 128", "--vocab-size 300", "does not fit"),
        (
            MOE,
            "no --num-experts no --moe-ffn-hidden-size",
            "--num-experts 4 --moe-ffn-hidden-size 48",
            "does not hold",
        ),
    ],
    ids=["hidden", "layers", "ffn", "vocabulary", "experts"],
)
def test_another_model(megatron: Megatron, sound: Path, flags, then: str, now: str, shapes: str) -> None:
    run = assert_refused(megatron, load(sound, *flags), shapes)
    assert then in run.log
    assert f"and this run has {now}" in run.log


def test_an_error_on_one_rank(megatron: Megatron, sound: Path) -> None:
    """It happens inside Megatron's load, while the other rank waits for this one."""
    run = megatron.run(load(sound), 2, ("probes.checkpoint:fail_on_rank_1",), fails=True, grace=60)
    assert run.codes == [2, 2], run.log[-3000:]
    lines = [line for line in run.log.splitlines() if line.startswith("sso_megatron: error:")]
    assert len(lines) == 1
    assert "the checkpoint cannot be loaded: RuntimeError: the disk is on fire" in lines[0]


# ---------------------------------------------------------------- optimizers


def test_state_of_another_optimizer(megatron: Megatron, sound: Path, adam: Path) -> None:
    for root, then, now in ((adam, "adam", "sso"), (sound, "sso", "adam")):
        said = f"was saved with --optimizer {then}; .* into --optimizer {now}: add --no-load-optim"
        assert_refused(megatron, load(root, optimizer=now), said)
        assert_loads(megatron, load(root, "--no-load-optim", optimizer=now), iteration=4)
    assert_loads(megatron, load(sound, optimizer="muon_sphere"), iteration=4)
    # A heavy ball has another scale than a moving average, under the same name.
    said = "was saved with --optimizer sso; .* into --optimizer spectra: add --no-load-optim"
    assert_refused(megatron, load(sound, optimizer="spectra"), said)


@pytest.mark.slow
def test_optional_state_is_dropped_where_it_is_missing() -> None:
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    def entry(key: str) -> ShardedObject:
        return ShardedObject(key, None, (1,), (0,), replica_id=0)

    spectral = OPTIONAL_STATE
    tensor = ShardedTensor.from_rank_offsets(f"{spectral}tensor", torch.zeros(2))
    tree = {
        "optimizer": {
            "spectral": {"a": entry(f"{spectral}a"), "b": entry(f"{spectral}b")},
            "chained": [{"c": entry(f"{spectral}c")}, entry(f"{spectral}d"), entry("optimizer.e"), tensor],
        },
    }
    drop_missing_optional(tree, {entry(f"{spectral}b").unique_key})
    left = tree["optimizer"]
    assert list(left["spectral"]) == ["b"]
    assert left["chained"][0] == {}
    assert [found.key for found in left["chained"][1:]] == ["optimizer.e", tensor.key]


def test_optional_state_that_is_missing_is_no_obstacle(megatron: Megatron, sound: Path) -> None:
    assert_loads(megatron, load(sound), iteration=4, calls=("probes.checkpoint:ask_for_optional_state",))
