"""`sso-megatron data`: by value, through Megatron's own readers and tokenizers."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from helpers.corpora import EOD, GLOBS, documents, indexed_dataset, make, names, write_corpus, written
from helpers.processes import HANGS_AFTER
from sso_megatron.cli.data import command as data
from sso_megatron.cli.data.corpus import File, assign_splits
from sso_megatron.cli.main import main

pytestmark = pytest.mark.megatron


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def test_megatron_reads_back_every_byte_and_the_eod(corpus: Path, tmp_path: Path) -> None:
    info = make(corpus, tmp_path / "out" / "d")
    found = documents(info)
    usable = [p for p in corpus.rglob("*") if p.suffix in {".py", ".txt"} and p.stat().st_size]
    assert len(usable) == 42
    assert found == {p.relative_to(corpus).as_posix(): [*p.read_bytes(), EOD] for p in usable}
    assert (info.vocab_size, info.eod, info.reused) == (257, EOD, False)
    assert info.skipped == [("empty.py", "empty")]
    assert json.loads((tmp_path / "out" / "d.json").read_text())["files_not_matching"] == 1


def test_the_splits_share_no_file_and_have_their_share_of_bytes(corpus: Path, tmp_path: Path) -> None:
    info = make(corpus, tmp_path / "d", split=(0.6, 0.3, 0.1))
    files = names(info)
    assert sum(map(len, files.values())) == len(set().union(*files.values())) == 42
    total = sum(info.tokens.values())
    for split, share in zip(data.SPLITS, (0.6, 0.3, 0.1), strict=True):
        assert info.tokens[split] / total == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1000, 1, 1), (1, 1, 1, 5000), (9,) * 10])
def test_no_split_stays_empty_and_a_huge_file_is_trained_on(sizes: tuple[int, ...]) -> None:
    files = [File(f"{i}.py", Path(f"{i}.py"), size, 0) for i, size in enumerate(sizes)]
    for seed in range(20):
        chosen = assign_splits(files, data.DEFAULT_SPLIT, seed)
        assert sorted(f for part in chosen.values() for f in part) == files
        assert all(chosen.values())
        if max(sizes) > 9:
            assert max(files, key=lambda f: f.size) in chosen["train"]


def test_two_runs_are_identical_wherever_the_files_lie(corpus: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(corpus, moved)
    a, b = make(corpus, tmp_path / "a" / "d"), make(moved, tmp_path / "b" / "d")
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert (a.digest, a.settings) == (b.digest, b.settings)
    other = make(corpus, tmp_path / "c" / "d", seed=1)
    assert names(other) != names(a)
    assert documents(other) == documents(a)


def test_overlapping_inputs_give_a_file_once(corpus: Path, tmp_path: Path) -> None:
    inputs = [corpus, corpus / "part1", corpus / "picture.png"]
    info = data.prepare(tmp_path / "d", inputs, GLOBS, quiet=True)
    assert sum(info.files.values()) == 43  # a file that is named is taken whatever its pattern
    assert {"corpus/part1/file1.py", "picture.png"} <= documents(info).keys()


BAD = [
    (["--input", "{}/nowhere"], "nowhere must be a folder or a file that exists"),
    (["--glob", "*.rs", "*.go"], r"*.rs *.go matches none of 44 files in"),
    (["--split", "0.9,0.1"], "split 0.9,0.1 must be three positive numbers"),
    (["--split", "0.9,0.1,0"], "split 0.9,0.1,0 must be three positive numbers"),
    (["--split", "0.9,0.9,0.9"], "must be three positive numbers that sum to 1"),
    (["--split", "nan,0.1,0.1"], "split nan,0.1,0.1 must be three positive numbers"),
    (["--split", "most,some,few"], "split most,some,few must be three positive numbers"),
    (["--tokenizer", "{}/nowhere.json"], "nowhere.json does not exist"),
    (["--tokenizer", "{}/corpus/plain.txt"], "plain.txt cannot be loaded: expected value"),
    (["--input", "{}/corpus/plain.txt"], "1 usable files, skipped []: three splits need"),
    (["--output", "{}/corpus/plain.txt/d"], "File exists: "),
]


def command(*words: str) -> int:
    return main(["data", *words])


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    given = ["--output", str(tmp_path / "d"), "--input", str(corpus), "--glob", *GLOBS]
    assert command(*given, *(flag.format(tmp_path) for flag in flags)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sso-megatron data: error: ")
    assert message in error
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


def test_the_command_says_what_it_did(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output", str(tmp_path / "d"), "--input", str(corpus), "--glob", *GLOBS]
    assert command(*flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("42 files of ")
    assert [line.partition(":")[0] for line in lines[1:4]] == [f"tokenized {s}" for s in data.SPLITS]
    assert lines[5] == f"skipped 1 files: empty (named in {tmp_path}/d.json)"
    assert lines[6].endswith("--tokenizer-type NullTokenizer --vocab-size 257")


def test_it_reads_utf8_or_says_why_not_when_a_tokenizer_needs_text(
    corpus: Path, tmp_path: Path, bpe: Path
) -> None:
    from tokenizers import Tokenizer

    info = make(corpus, tmp_path / "d", tokenizer=str(bpe))
    reasons = dict(info.skipped)
    assert reasons.keys() == {"empty.py", "all_bytes.txt"}
    assert "can't decode byte 0x80 in position 128" in reasons["all_bytes.txt"]
    reference = Tokenizer.from_file(str(bpe))
    eod = reference.token_to_id("<|endoftext|>")
    assert (info.eod, info.vocab_size) == (eod, reference.get_vocab_size())
    found = documents(info)
    assert len(found) == 41
    for name, ids in found.items():
        assert ids[-1] == eod
        assert eod not in ids[:-1]  # although every other file contains the words
        assert reference.decode(ids[:-1]) == (corpus / name).read_text(encoding="utf-8")
    # The tokenizer is kept with the data: losing the original is no loss.
    bpe.rename(bpe.with_name("gone.json"))
    assert data.load(info.output).vocab_size == info.vocab_size


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|endoftext|>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["abc xyz abc <é> xyz plain"] * 20, trainer)
    path = tmp_path / "bpe" / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_without_an_end_of_document_is_refused(corpus: Path, bpe: Path) -> None:
    bpe.write_text(bpe.read_text(encoding="utf-8").replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"no eos_token .*must be 1"):
        make(corpus, corpus.parent / "d", tokenizer=str(bpe))
    config = {"eos_token": "<|other|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    bpe.with_name("tokenizer_config.json").write_text(json.dumps(config))
    assert make(corpus, corpus.parent / "d", tokenizer=str(bpe)).eod == 1
    folder = make(corpus, corpus.parent / "e", tokenizer=str(bpe.parent))
    assert documents(folder) == documents(data.load(corpus.parent / "d"))


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_megatron_trains_on_it_with_these_arguments(
    corpus: Path, tmp_path: Path, kind: str, bpe: Path
) -> None:
    """The flags, through Megatron's own parser, tokenizer, builder and GPTDataset."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import add_megatron_arguments
    from megatron.training.utils import get_blend_and_blend_per_split

    tokenizer = "byte" if kind == "byte" else str(bpe)
    info = make(corpus, tmp_path / "d", tokenizer=tokenizer, split=(0.6, 0.2, 0.2))
    parser = add_megatron_arguments(argparse.ArgumentParser())
    args = parser.parse_args(info.megatron_arguments())
    args.rank = 0
    megatron = build_tokenizer(args)
    assert (megatron.eod, megatron.vocab_size) == (info.eod, info.vocab_size)
    assert args.padded_vocab_size == 384
    assert args.split is None

    length = 64
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=megatron,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        mid_level_dataset_surplus=0.005,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, config)
    by_name = documents(info)
    for split, dataset in zip(data.SPLITS, builder.build(), strict=True):
        texts = [by_name[name] for name in names(info)[split]]
        stream = [i for document in dataset.document_index for i in texts[document]]
        assert len(dataset) == (info.tokens[split] - 1) // length
        for sample, place in zip(dataset, dataset.shuffle_index, strict=True):
            start = int(place) * length
            assert sample["tokens"].tolist() == stream[start : start + length]
            assert sample["labels"].tolist() == stream[start + 1 : start + length + 1]
            assert sample["loss_mask"].min() == 1


def test_the_standard_library_is_a_corpus_of_millions_of_bytes(tmp_path: Path) -> None:
    info = data.prepare(tmp_path / "stdlib", quiet=True)
    total = sum(info.tokens.values())
    assert total >= 5_000_000
    for split, share in zip(data.SPLITS, data.DEFAULT_SPLIT, strict=True):
        assert info.tokens[split] / total == pytest.approx(share, abs=0.002)
    everything = {name for files in names(info).values() for name in files}
    assert "argparse.py" in everything
    assert not [name for name in everything if "site-packages" in name]
    split = next(split for split, files in names(info).items() if "argparse.py" in files)
    place = names(info)[split].index("argparse.py")
    dataset = indexed_dataset().IndexedDataset(info.prefixes[split])  # its arrays die with it: keep it
    assert bytes(dataset[place][:-1].astype(np.uint8)) == Path(argparse.__file__).read_bytes()


def test_a_toolkit_without_a_device_is_not_mentioned(tmp_path: Path) -> None:
    """torch warns of it when Megatron is imported, which says nothing to somebody who prepares data."""
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.py").write_text("print()\n" * number)
    command = [sys.executable, "-m", "sso_megatron.cli.main", "data", "--input", str(tmp_path / "text")]
    ended = subprocess.run(
        [*command, "--output", str(tmp_path / "out" / "d")],
        env=os.environ | {"CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=True,
    )
    assert "CUDA" not in ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("train on it with: ")
