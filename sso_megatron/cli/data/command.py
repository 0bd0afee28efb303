"""``sso-megatron data`` turns text files into the indexed datasets that Megatron trains on."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sso_megatron.cli.data.corpus import (
    BYTE_EOD,
    DEFAULT_GLOBS,
    SPLITS,
    STANDARD_LIBRARY,
    File,
    Skipped,
    assign_splits,
    digest,
    find_files,
    identity,
    make_encoder,
    sha256,
)
from sso_megatron.cli.shared.megatron_process import without_noise

DEFAULT_SPLIT = (0.9, 0.05, 0.05)


@dataclass(frozen=True)
class DatasetInfo:
    """A complete data set on disk.

    Attributes:
        output: absolute prefix of all its files.
        vocab_size: number of ids, before Megatron's padding.
        eod: id of the end-of-document token, the last token of every document.
        tokens: tokens of each split, end-of-document tokens included.
        files: documents (one a file) of each split.
        skipped: name and reason of each file that was left out.
        settings: settings that it was made with; the same settings reuse it.
        digest: SHA-256 over the data files.
        reused: whether it was on disk already.
    """

    output: Path
    vocab_size: int
    eod: int
    tokens: dict[str, int]
    files: dict[str, int]
    skipped: Skipped
    settings: dict[str, Any]
    digest: str
    reused: bool = True

    @property
    def prefixes(self) -> dict[str, str]:
        """Prefix of the .bin and the .idx file, by split."""
        return {split: f"{self.output}_{split}" for split in SPLITS}

    def megatron_arguments(self) -> list[str]:
        """Return the flags with which Megatron trains on this data set (never add --split)."""
        flags = [f for s in SPLITS for f in (f"--{s}-data-path", self.prefixes[s])]
        # Megatron keys its cached sample order by the path, not by the content: after a rewrite it
        # would read the new files in the old order. So each content gets a cache of its own.
        flags += ["--data-cache-path", f"{self.output}_cache/{self.digest[:16]}"]
        if self.settings["tokenizer"] == "byte":  # NullTokenizer's eod is its last id, so 256
            return [*flags, "--tokenizer-type", "NullTokenizer", "--vocab-size", f"{BYTE_EOD + 1}"]
        model = f"{self.output}_tokenizer"
        return [*flags, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model]

    def __str__(self) -> str:
        """Describe the data set in one line."""
        counts = (f"{s} {self.tokens[s]:,} tokens of {self.files[s]:,} files" for s in SPLITS)
        return f"{self.output}: {', '.join(counts)}; vocabulary {self.vocab_size}, eod {self.eod}"


def load(output: str | Path) -> DatasetInfo:
    """Describe the complete data set at prefix `output`; its inputs need not exist any more.

    Raises:
        ValueError: there is no data set, or its files are not what its json says.
    """
    output = Path(os.path.abspath(output))
    try:
        record = json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))
        for name, size in record["sizes"].items():
            if Path(f"{output}{name}").stat().st_size != size:
                raise ValueError(f"{output}{name} is not the {size} bytes that its json says")
        splits = record["splits"]
        return DatasetInfo(
            output=output,
            tokens={s: splits[s]["tokens"] for s in SPLITS},
            files={s: len(splits[s]["files"]) for s in SPLITS},
            skipped=[(name, reason) for name, reason in record["skipped"]],
            **{key: record[key] for key in ("vocab_size", "eod", "settings", "digest")},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        rule = "must be written by sso-megatron data and complete"
        raise ValueError(f"data set {output} {rule}: {error}") from error


def prepare(
    output: str | Path,
    inputs: Sequence[str | Path] | None = None,
    globs: Sequence[str] = DEFAULT_GLOBS,
    tokenizer: str = "byte",
    split: Sequence[float | str] = DEFAULT_SPLIT,
    seed: int = 0,
    force: bool = False,
    quiet: bool = False,
) -> DatasetInfo:
    """Write (or reuse) the training, validation and test data sets of some files.

    This function knows no process group: call it on one rank.

    Args:
        output: prefix of everything that is written; its folder is made when missing.
        inputs: folders, searched with `globs`, and files, taken whatever their name; by default
            the source files of Python's standard library.
        globs: patterns for the file name or, with a "/" in them, for the end of the path.
        tokenizer: "byte" (256 byte values and an end-of-document id), the path of a tokenizer.json,
            or a Hugging Face tokenizer's folder or name.
        split: shares of the bytes for training, validation and test; files are never cut.
        seed: decides, with a file's relative name, its split and its place.
        force: rewrite what is there, whatever it is.
        quiet: print nothing.

    Raises:
        ValueError: bad input, or `output` holds something made with other settings.
        OSError: `output` cannot be written.
    """
    output = Path(os.path.abspath(output))
    try:
        shares = [float(share) for share in split]
    except ValueError:
        shares = []
    if len(shares) != 3 or not min(shares) > 0 or abs(sum(shares) - 1) > 1e-6:
        rule = "must be three positive numbers that sum to 1, such as 0.9,0.05,0.05"
        raise ValueError(f"split {','.join(map(str, split))} {rule}")
    say = (lambda line: None) if quiet else print
    files, skipped, unmatched = find_files(inputs, globs)
    listing = json.dumps([(f.name, f.size, f.mtime_ns) for f in files])
    settings = {"tokenizer": identity(tokenizer), "split": shares, "seed": seed}
    settings["files"] = f"{len(files)} with names, sizes and times {sha256(listing)[:16]}"
    if not force and (found := _reusable(output, settings)):
        say(f"reused {found}")
        return found
    if len(files) < len(SPLITS):
        rule = "three splits need at least 3, and files are never cut; give more, or smaller, files"
        raise ValueError(f"{len(files)} usable files, skipped {skipped[:3]}: {rule}")
    say(f"{len(files):,} files of {sum(f.size for f in files):,} bytes, {unmatched:,} do not match")
    record: dict[str, Any] = {"settings": settings, "tokenizer": tokenizer, "globs": list(globs)}
    record["inputs"] = [str(Path(i).resolve()) for i in inputs or [STANDARD_LIBRARY]]
    record["files_not_matching"] = unmatched
    output.parent.mkdir(parents=True, exist_ok=True)
    # Hidden and beside the output: same file system, so that each rename is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.partial-", dir=output.parent) as temp:
        record |= _write(Path(temp), assign_splits(files, shares, seed), tokenizer, skipped, quiet)
        _publish(Path(temp), output, record)
    info = replace(load(output), reused=False)
    say(f"wrote {info}")
    for reason, count in Counter(reason.partition(":")[0] for _, reason in skipped).items():
        say(f"skipped {count} files: {reason} (named in {output}.json)")
    return info


def _write(
    temp: Path, chosen: dict[str, list[File]], tokenizer: str, skipped: Skipped, quiet: bool
) -> dict[str, Any]:
    """Write the data files into `temp`, add to `skipped`, and return the entries of the json."""
    with without_noise():  # what is missing for training is of no concern to somebody who prepares data
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from rich.console import Console
    from rich.progress import Progress

    encode, vocab_size, eod = make_encoder(tokenizer, temp / "_tokenizer")
    # The limit of GPTDatasetConfig.token_dtype_code and not of DType.optimal_dtype (65,500): with
    # --per-dataset-sequences-path Megatron presumes that one and ignores the file's own header.
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    splits: dict[str, Any] = {}
    # Off a terminal the line after each split is all; rich would draw a bar into the log.
    hidden = quiet or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=hidden) as bar:
        for split, files in chosen.items():
            task = bar.add_task(f"tokenizing {split}", total=sum(f.size for f in files))
            builder = IndexedDatasetBuilder(str(temp / f"_{split}.bin"), dtype=dtype)
            names, tokens = [], 0
            for file in files:
                bar.advance(task, file.size)
                try:
                    ids = encode(file.path.read_bytes())
                except (OSError, UnicodeDecodeError) as error:
                    skipped.append((file.name, f"unreadable: {error}"))
                    continue
                if ids.max(initial=0) >= vocab_size:
                    rule = f"must be below the vocabulary size {vocab_size}; mend {tokenizer}"
                    raise ValueError(f"token id {ids.max()} of {file.name} {rule}")
                document = np.full(len(ids) + 1, eod, dtype=dtype)
                document[:-1] = ids
                builder.add_document(document, [len(document)])
                names.append(file.name)
                tokens += len(document)
            builder.finalize(str(temp / f"_{split}.idx"))
            if not names:
                why = f"{len(files)} files of the {split} split were skipped: {skipped[-1]}"
                raise ValueError(f"all {why}; give more files or another --seed")
            splits[split] = {"tokens": tokens, "files": names}
            if not quiet:
                print(f"tokenized {split}: {tokens:,} tokens of {len(names):,} files", flush=True)
    paths = {p.relative_to(temp).as_posix(): p for p in sorted(temp.rglob("*")) if p.is_file()}
    return {
        "vocab_size": vocab_size,
        "eod": eod,
        "dtype": dtype.__name__,
        "sizes": {name: path.stat().st_size for name, path in paths.items()},
        "digest": digest(paths.values()),
        "skipped": sorted(skipped),
        "splits": splits,
    }


def _publish(temp: Path, output: Path, record: dict[str, Any]) -> None:
    """Rename the files in `temp` to their places: every .idx after every .bin, the json last of all."""
    json_path = temp / ".json"
    json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    # The files that make the old ones a data set are removed first, so that old and new are never mixed.
    for old in (".json", *(f"_{split}.idx" for split in SPLITS)):
        Path(f"{output}{old}").unlink(missing_ok=True)
    shutil.rmtree(f"{output}_tokenizer", ignore_errors=True)
    order = sorted((p.name for p in temp.iterdir()), key=lambda n: (n == ".json", n[-4:] == ".idx"))
    for name in order:
        os.replace(temp / name, f"{output}{name}")


def _reusable(output: Path, settings: dict[str, Any]) -> DatasetInfo | None:
    """Return the data set at `output`, None if nothing is there, or raise ValueError."""
    names = [".json", "_tokenizer", *(f"_{s}.{end}" for s in SPLITS for end in ("bin", "idx"))]
    there = [f"{output}{name}" for name in names if os.path.lexists(f"{output}{name}")]
    if not there:
        return None
    way_out = "pass --force to rewrite it, or another --output"
    try:
        found = load(output)
    except ValueError as error:
        raise ValueError(f"{there[0]} is in the way: {error}; {way_out}") from error
    old = found.settings
    if changed := [f"{k} {old.get(k)}, not {v}" for k, v in settings.items() if old.get(k) != v]:
        raise ValueError(f"{output} was made with {' and '.join(changed)}; {way_out}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sso-megatron data``."""
    parser.description = "turn text files into indexed datasets that Megatron trains on"
    add = parser.add_argument
    add("--output", required=True, metavar="PREFIX", help="prefix of the files to write")
    text = "folders and files (default: the source of Python's standard library)"
    add("--input", nargs="+", metavar="PATH", help=text)
    text = f"which files of a folder (default: {' '.join(DEFAULT_GLOBS)})"
    add("--glob", nargs="+", default=DEFAULT_GLOBS, metavar="PATTERN", help=text)
    text = "byte (default), a tokenizer.json, or a Hugging Face tokenizer's folder or name"
    add("--tokenizer", default="byte", help=text)
    text = "shares of the bytes for training, validation and test (default: %(default)s)"
    add("--split", default=",".join(map(str, DEFAULT_SPLIT)), help=text)
    add("--seed", type=int, default=0, help="another seed is another split (default: 0)")
    add("--force", action="store_true", help="rewrite what is there")


def run(options: argparse.Namespace) -> int:
    """Run the ``data`` command."""
    o = options
    info = prepare(o.output, o.input, o.glob, o.tokenizer, o.split.split(","), o.seed, o.force)
    print(f"train on it with: {shlex.join(info.megatron_arguments())}")
    return 0
