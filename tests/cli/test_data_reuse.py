"""When `sso-megatron data` takes a data set as it lies, and that no interruption leaves half of one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.corpora import EOD, GLOBS, documents, indexed_dataset, make, write_corpus, written
from sso_megatron.cli.data import command as data

pytestmark = pytest.mark.megatron


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def test_the_same_settings_reuse_and_force_rewrites(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "d"
    first = make(corpus, output)
    inode = Path(f"{output}_train.bin").stat().st_ino
    again = data.prepare(output, [corpus], GLOBS)
    assert capsys.readouterr().out.startswith(f"reused {output}: train ")
    assert Path(f"{output}_train.bin").stat().st_ino == inode
    assert again == data.load(output)
    assert again.reused and again.digest == first.digest
    forced = make(corpus, output, force=True)
    assert not forced.reused and forced.digest == first.digest
    assert Path(f"{output}_train.bin").stat().st_ino != inode


def test_other_settings_or_files_need_force(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "d"
    first = make(corpus, output)
    with pytest.raises(ValueError, match=r"made with seed 0, not 3; pass --force"):
        make(corpus, output, seed=3)
    with pytest.raises(ValueError, match=r"made with split .*0\.05\], not \[0\.8"):
        make(corpus, output, split=(0.8, 0.1, 0.1))
    (corpus / "plain.txt").write_text("other\n")  # of the same size
    os.utime(corpus / "plain.txt", ns=(1, 1))
    with pytest.raises(ValueError, match=r"made with files .*--force"):
        make(corpus, output)
    changed = make(corpus, output, force=True)
    assert documents(changed)["plain.txt"] == [*b"other\n", EOD]
    # Megatron's sample order is cached by path: another content must not find the old cache.
    flag = first.megatron_arguments().index("--data-cache-path")
    assert first.megatron_arguments()[flag + 1] != changed.megatron_arguments()[flag + 1]


def test_a_damaged_data_set_is_not_reused(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "d"
    make(corpus, output)
    with Path(f"{output}_valid.bin").open("r+b") as stream:
        stream.truncate(10)
    with pytest.raises(ValueError, match=r"d_valid\.bin is not the .* bytes .*--force"):
        make(corpus, output)
    with pytest.raises(ValueError, match=r"must be written by sso-megatron data"):
        data.load(tmp_path / "none")


def test_an_interrupted_tokenization_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = tmp_path / "out", []

    def interrupt(self: object, *rest: object) -> None:
        calls.append(sorted(p.name for p in folder.iterdir()))
        if len(calls) == 41:  # train is complete by then
            raise KeyboardInterrupt

    monkeypatch.setattr(indexed_dataset().IndexedDatasetBuilder, "add_document", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(corpus, folder / "d")
    # Even a killed process, which cleans up nothing, leaves only a hidden folder.
    assert all(len(there) == 1 and there[0].startswith(".d.partial-") for there in calls)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("over_an_old_one", [False, True])
@pytest.mark.parametrize("step", range(7))
def test_an_interrupted_rename_is_never_taken_for_a_data_set(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, over_an_old_one: bool
) -> None:
    output, rename = tmp_path / "out" / "d", os.replace
    expected = written(make(corpus, tmp_path / "expected" / "d").output.parent)
    if over_an_old_one:
        make(corpus, output, seed=9)
    done = 0

    def interrupt(source: Path, target: str) -> None:
        nonlocal done
        if done == step:
            raise KeyboardInterrupt
        rename(source, target)
        done += 1

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(corpus, output, force=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="must be written"):
        data.load(output)
    for split in data.SPLITS:  # what Megatron would accept is right, never new with old
        if indexed_dataset().IndexedDataset.exists(f"{output}_{split}"):
            for end in ("bin", "idx"):
                assert Path(f"{output}_{split}.{end}").read_bytes() == expected[f"d_{split}.{end}"]
    if step or over_an_old_one:
        with pytest.raises(ValueError, match="in the way"):
            make(corpus, output)
    make(corpus, output, force=True)
    assert written(output.parent) == expected
