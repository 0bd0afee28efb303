"""Runs that are killed while they save: nothing half-written is loaded, and nothing complete is lost."""

import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from helpers.megatron_runs import Megatron, Run, tiny
from helpers.probes.checkpoint import POINTS
from sso_megatron.mcore.checkpoint.folders import (
    MANIFEST,
    TRACKER,
    FolderError,
    complete_iterations,
    find_leftovers,
    iteration_folder,
    mend,
    old_of,
    partial_of,
    publish,
    start_partial,
)

ITERATIONS = 30


@dataclass(frozen=True)
class Kill:
    """Which rank dies, in which of its saves, and where: at a point, or after a part of a save's time."""

    rank: int
    save: int
    point: str | None = None
    part: float | None = None


def kills() -> list[Kill]:
    """Every point once, in an order in which an iteration is saved again, and eleven random moments."""
    draw = random.Random(7)
    moments = [(i + draw.random()) / 11 for i in range(11)]
    draw.shuffle(moments)
    random_moments = [Kill(i % 2, draw.choice((1, 2)), part=part) for i, part in enumerate(moments)]
    points = [Kill(0, 2 if point == "before tracker" else 1, point) for point in POINTS]
    return [*random_moments[:6], *points, *random_moments[6:]]


def losses_by_iteration(run: Run) -> dict[int, float]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return {line["iteration"]: line["loss"] for line in lines}


def test_killed_twenty_times(megatron: Megatron, tmp_path: Path) -> None:
    """One run, killed in twenty saves and restarted with the same command line each time."""
    root = tmp_path / "ckpt"
    argv = tiny("--train-iters", ITERATIONS, "--spectral-run-dir", ".", "--spectral-mup-init")
    argv += ["--save-interval", "2", "--save"]
    timed = megatron.run([*argv, str(tmp_path / "straight")], 2, ("probes.checkpoint:time_saves",))
    straight = losses_by_iteration(timed)
    argv += [str(root), "--load", str(root)]
    saved, seen, num_in_time = 0, {}, 0

    def check(run: Run, after: object) -> None:
        nonlocal saved
        losses = losses_by_iteration(run)
        assert min(losses) - 1 >= saved, f"iteration {saved} was lost after {after}"
        for iteration, loss in losses.items():
            assert loss == straight[iteration], (iteration, after)
        seen.update(losses)
        successes = re.findall(r"successfully saved checkpoint from iteration +(\d+)", run.log)
        saved = max(saved, *map(int, successes)) if successes else saved

    previous: object = "nothing"
    for kill in kills():
        (tmp_path / "plan.json").write_text(json.dumps(asdict(kill)))
        run = megatron.run(argv, 2, ("probes.checkpoint:die",), fails=True, grace=2)
        assert run.codes[kill.rank] == -9, f"{kill}: exit codes {run.codes}\n{run.log[-3000:]}"
        check(run, previous)
        undone = "was about to be replaced when a run ended; the old one is back" in run.log
        assert undone == (getattr(previous, "point", None) == "between renames")
        print(kill, "saved", saved, "there", complete_iterations(root))
        num_in_time += (run.folder / "in_time").exists()
        previous = kill
    # Every kill is within a save; those that came with its end would be no spread.
    print(f"{num_in_time} of 11 kills before the end of a save")
    assert num_in_time >= 4, "saves take less than a third of the time that the ones before them took"
    check(megatron.run(argv, 2), previous)
    assert seen.keys() == straight.keys()
    assert {p.name for p in root.iterdir() if not p.name.startswith("iter_")} == {TRACKER}


def test_saved_in_the_background(megatron: Megatron, tmp_path: Path) -> None:
    """The folder appears when the save is finalised, after that the tracker; and it can be loaded."""
    root = tmp_path / "ckpt"
    argv = tiny("--train-iters", 8, "--spectral-run-dir", ".", "--save", root, "--save-interval", 4)
    argv.append("--spectral-mup-init")
    background = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    run = megatron.run([*argv, *background], 2, ("probes.checkpoint:allow_async_save",))
    assert "scheduled an async checkpoint save at iteration       4" in run.log
    assert complete_iterations(root) == [4, 8]
    assert all((iteration_folder(root, iteration) / MANIFEST).exists() for iteration in (4, 8))
    assert (root / TRACKER).read_text() == "8"
    assert {p.name for p in root.iterdir() if not p.name.startswith("iter_")} == {TRACKER}
    again = [*argv, "--load", str(root), "--ckpt-step", "4", "--verify-integrity"]
    losses = losses_by_iteration(megatron.run(again, 2))
    assert losses.keys() == {5, 6, 7, 8}
    for iteration, loss in losses.items():
        assert loss == losses_by_iteration(run)[iteration]


# ---------------------------------------------------------------- the folder alone


def make(folder: Path, text: str = "new") -> Path:
    folder.mkdir(parents=True)
    (folder / "data").write_text(text)
    (folder / MANIFEST).write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for iteration in (2, 4):
        make(iteration_folder(tmp_path, iteration))
    (tmp_path / TRACKER).write_text("4")
    return tmp_path


def test_a_sound_folder_is_left_alone(root: Path) -> None:
    assert find_leftovers(root) is None
    (root / TRACKER).write_text("2")  # somebody goes back
    iteration_folder(root, 6).mkdir()  # Megatron makes it first
    make(partial_of(iteration_folder(root, 6)))
    assert find_leftovers(root) is None
    assert find_leftovers(root / "nowhere") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is missing"),
        ("", "is empty"),
        ("4\x00", "reads '4\\x00'"),
        ("6", "names iter_0000006, which is not complete"),
        ("8", "names iter_0000008, which is not there"),
    ],
)
def test_a_wrong_tracker_names_the_newest_complete_one(root: Path, text: str | None, said: str) -> None:
    (iteration_folder(root, 6)).mkdir()
    (iteration_folder(root, 6) / "metadata.json").write_text("{}")
    if text is None:
        (root / TRACKER).unlink()
    else:
        (root / TRACKER).write_text(text)
    damage = find_leftovers(root)
    assert damage is not None
    assert damage.line == (
        f"{root / TRACKER} {said}; it now names iteration 4, the newest complete checkpoint"
    )
    mend(root, damage)
    assert (root / TRACKER).read_text() == "4"
    assert find_leftovers(root) is None


def test_the_first_save_of_a_run_removes_what_others_left(root: Path) -> None:
    two, four, six = (iteration_folder(root, iteration) for iteration in (2, 4, 6))
    needed = make(old_of(six))
    for left in (partial_of(two), old_of(four)):
        make(left)
    start_partial(six, sweep=True)
    assert {p for p in root.iterdir() if p.is_dir()} == {two, four, needed, partial_of(six)}


def test_nothing_to_go_on_with(tmp_path: Path) -> None:
    assert find_leftovers(tmp_path) is None, "a run that begins"
    (tmp_path / TRACKER).write_text("")
    with pytest.raises(FolderError, match=r"is empty, and no complete checkpoint is there; .* remove it"):
        find_leftovers(tmp_path)


def test_checkpoints_of_megatron_alone_count(tmp_path: Path) -> None:
    for name in ("metadata.json", ".metadata"):
        folder = iteration_folder(tmp_path, 3)
        folder.mkdir(exist_ok=True)
        assert complete_iterations(tmp_path) == []
        (folder / name).write_text("")
    assert complete_iterations(tmp_path) == [3]
    (iteration_folder(tmp_path, 5) / "mp_rank_00").mkdir(parents=True)
    (tmp_path / TRACKER).write_text("5")
    assert find_leftovers(tmp_path) is None, "--ckpt-format torch leaves no mark"


class Killed(Exception):
    pass


@pytest.mark.parametrize("steps", range(5))
def test_an_iteration_that_is_saved_again_is_there_at_every_step(
    root: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    from sso_megatron.mcore.checkpoint import folders

    folder = iteration_folder(root, 4)
    (folder / "data").write_text("old")
    start_partial(folder, sweep=True)
    for name, text in (("data", "new"), (MANIFEST, "{}")):
        (partial_of(folder) / name).write_text(text)
    done = 0

    def counted(original):
        def call(*args):
            nonlocal done
            if done == steps:
                raise Killed
            done += 1
            return original(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "rename", counted(folders.os.rename))
        patch.setattr(folders.shutil, "rmtree", counted(folders.shutil.rmtree))
        try:
            publish(folder)
        except Killed:
            assert steps < 3
    damage = find_leftovers(root)
    if damage is not None:
        assert "the old one is back" in damage.line
        mend(root, damage)
    assert (folder / "data").read_text() == ("old" if steps < 2 else "new")
    # The next save of the iteration works from wherever this one was left.
    start_partial(folder, sweep=True)
    shown = partial_of(folder)
    for name, text in (("data", "newer"), (MANIFEST, "{}")):
        (shown / name).write_text(text)
    publish(folder)
    assert (folder / "data").read_text() == "newer"
    assert not old_of(folder).exists()
    assert not partial_of(folder).exists()


def test_a_checkpoint_in_the_format_torch_waits_as_old(tmp_path: Path) -> None:
    """It has no mark of being complete, and is no less of a checkpoint."""
    folder = iteration_folder(tmp_path, 10)
    (folder / "mp_rank_00").mkdir(parents=True)
    (tmp_path / TRACKER).write_text("10")
    make(partial_of(folder))
    # Killed between the renames.
    folder.rename(old_of(folder))
    damage = find_leftovers(tmp_path)
    assert damage is not None
    mend(tmp_path, damage)
    assert (folder / "mp_rank_00").is_dir()
    publish(folder)
    assert (folder / MANIFEST).exists() and not old_of(folder).exists()


def test_a_link_to_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere", "kept")
    folder = iteration_folder(tmp_path, 10)
    folder.symlink_to(elsewhere)
    make(partial_of(folder))
    publish(folder)
    assert not folder.is_symlink() and not old_of(folder).is_symlink()
    assert (elsewhere / "data").read_text() == "kept"
