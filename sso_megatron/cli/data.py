"""`sso-megatron data`: turn text files into the indexed datasets that Megatron trains on."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import stat
import sys
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "valid", "test")
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
DEFAULT_GLOBS = ("*.py",)
DEFAULT_SPLIT = (0.9, 0.05, 0.05)
BYTE_EOD = 256  # the first id after the 256 byte values, so byte-level has 257 ids
# Names that tokenizer files give their end of text; a bare tokenizer.json does not say which of its
# special tokens it is, so exactly one of these must be in its vocabulary.
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eod|>")
MAX_FILE_BYTES = 2**31 - 2  # Megatron's index stores a document's length, eod included, as int32

_Skipped = list[tuple[str, str]]  # (name, reason)


class _File(NamedTuple):
    name: str  # relative to its input, with "/": the same on every machine
    path: Path
    size: int
    mtime_ns: int


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
        settings: what it was made with; the same settings reuse it.
        digest: SHA-256 over the data files.
        reused: whether it was on disk already.
    """

    output: Path
    vocab_size: int
    eod: int
    tokens: dict[str, int]
    files: dict[str, int]
    skipped: _Skipped
    settings: dict[str, Any]
    digest: str
    reused: bool = True

    @property
    def prefixes(self) -> dict[str, str]:
        """Prefix of the .bin and .idx file of each split."""
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
        """Say in one line what it is."""
        counts = (f"{s} {self.tokens[s]:,} tokens of {self.files[s]:,} files" for s in SPLITS)
        return f"{self.output}: {', '.join(counts)}; vocabulary {self.vocab_size}, eod {self.eod}"


def load(output: str | Path) -> DatasetInfo:
    """Describe the complete data set at prefix `output`; its inputs need not exist any more.

    Raises:
        ValueError: there is none, or its files are not what its json says.
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

    It knows no process group: call it on one rank.

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
    files, skipped, unmatched = _find(inputs, globs)
    listing = json.dumps([(f.name, f.size, f.mtime_ns) for f in files])
    settings = {"tokenizer": _identity(tokenizer), "split": shares, "seed": seed}
    settings["files"] = f"{len(files)} with names, sizes and times {_sha256(listing)[:16]}"
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
        record |= _write(Path(temp), _assign(files, shares, seed), tokenizer, skipped, quiet)
        _publish(Path(temp), output, record)
    info = replace(load(output), reused=False)
    say(f"wrote {info}")
    for reason, count in Counter(reason.partition(":")[0] for _, reason in skipped).items():
        say(f"skipped {count} files: {reason} (named in {output}.json)")
    return info


def _find(inputs: Sequence[str | Path] | None, globs: Sequence[str]) -> tuple[list[_File], _Skipped, int]:
    """Return the usable files by name, the others with the reason, and how many match no glob."""
    foreign = set() if inputs else {"site-packages", "dist-packages"}
    roots = [Path(i) for i in inputs or [STANDARD_LIBRARY]]
    candidates: dict[Path, str] = {}  # by real path: overlapping inputs give a file only once
    files: list[_File] = []
    unreadable: list[OSError] = []  # folders
    unmatched = 0
    for root in roots:
        if root.is_file():
            candidates.setdefault(root.resolve(), root.name)
            continue
        if not root.is_dir():
            raise ValueError(f"input {root} must be a folder or a file that exists; check --input")
        label = f"{root.resolve().name}/" if len(roots) > 1 else ""
        for folder, below, names in os.walk(root, onerror=unreadable.append):
            below[:] = sorted(set(below) - foreign)
            inside = Path(folder).relative_to(root)
            for relative in (inside / name for name in sorted(names)):
                if any(relative.match(pattern) for pattern in globs):
                    candidates.setdefault((root / relative).resolve(), label + relative.as_posix())
                else:
                    unmatched += 1
    if not candidates:
        searched = f"{unmatched} files in {', '.join(map(str, roots))}"
        raise ValueError(f"{' '.join(globs)} matches none of {searched}; change --glob")
    skipped: _Skipped = [(error.filename, f"unreadable: {error}") for error in unreadable]
    for path, name in sorted(candidates.items(), key=lambda item: (item[1], item[0])):
        try:
            status = path.stat()
        except OSError as error:
            skipped.append((name, f"unreadable: {error}"))
            continue
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
            skipped.append((name, "not a regular file"))
        elif status.st_size == 0:
            skipped.append((name, "empty"))
        elif status.st_size > MAX_FILE_BYTES:
            skipped.append((name, f"over {MAX_FILE_BYTES} bytes, cut it into several files"))
        else:
            files.append(_File(name, path, status.st_size, status.st_mtime_ns))
    return files, skipped, unmatched


def _assign(files: list[_File], shares: Sequence[float], seed: int) -> dict[str, list[_File]]:
    """Give each file, in hashed order, to the emptiest split with room for it; none stays empty."""
    total = sum(f.size for f in files)
    target = {split: share * total for split, share in zip(SPLITS, shares, strict=True)}
    chosen: dict[str, list[_File]] = {split: [] for split in SPLITS}
    held = dict.fromkeys(SPLITS, 0)
    # Largest first would balance better, but leave only small files to validation and test.
    for place, file in enumerate(sorted(files, key=lambda f: _sha256(f"{seed}:{f.name}"))):
        empty = [split for split in SPLITS if not chosen[split]]
        excess = {s: max(0.0, held[s] + file.size - target[s]) for s in SPLITS}
        open_to_it = empty if len(files) - place <= len(empty) else SPLITS
        split = min(open_to_it, key=lambda s: (excess[s], held[s] / target[s], target[s]))
        chosen[split].append(file)
        held[split] += file.size
    return chosen


def _encoder(tokenizer: str, folder: Path) -> tuple[Callable[[bytes], npt.NDArray[Any]], int, int]:
    """Return bytes -> ids (without eod), the vocabulary size and the eod id.

    A Hugging Face tokenizer is saved to `folder` and sized by what Megatron makes of that copy, so
    that training needs neither the original nor a network.
    """
    if tokenizer == "byte":
        return lambda raw: np.frombuffer(raw, np.uint8), BYTE_EOD + 1, BYTE_EOD
    try:
        from megatron.core.tokenizers import MegatronTokenizer
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        path = Path(tokenizer)
        if path.is_file() and not (path.parent / "tokenizer_config.json").is_file():
            fast: Any = PreTrainedTokenizerFast  # untyped in transformers
            source = fast(tokenizer_file=tokenizer)
        else:
            source = AutoTokenizer.from_pretrained(path.parent if path.is_file() else tokenizer)
        if source.eos_token is None and source.sep_token is None:  # Megatron takes sep for eos
            names = [name for name in EOD_NAMES if name in source.get_vocab()]
            if len(names) != 1:
                known = f"{len(names)} of {' '.join(EOD_NAMES)} in its vocabulary (must be 1)"
                raise ValueError(f"no eos_token in its tokenizer_config.json, and {known}")
            source.eos_token = names[0]
        source.save_pretrained(folder)
        library = {"library": "huggingface"}
        copy = MegatronTokenizer.from_pretrained(str(folder), metadata_path=library)
        eod, vocab_size = int(copy.eod), int(copy.vocab_size)
    except Exception as error:  # as broad as this because the Rust tokenizers raise Exception
        way_out = "give byte, a tokenizer.json, or a Hugging Face tokenizer's folder or name"
        raise ValueError(f"tokenizer {tokenizer} cannot be loaded: {error}; {way_out}") from error

    def encode(raw: bytes) -> npt.NDArray[Any]:
        # The text "<|endoftext|>" inside a file is text: only a file's end is an end of document.
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return np.asarray(source(raw.decode("utf-8"), **options).input_ids, dtype=np.int64)

    return encode, vocab_size, eod


def _write(
    temp: Path, chosen: dict[str, list[_File]], tokenizer: str, skipped: _Skipped, quiet: bool
) -> dict[str, Any]:
    """Write the data files into `temp`, add to `skipped`, return what the json says of them."""
    with warnings.catch_warnings():  # of no concern to somebody who prepares data
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from rich.console import Console
    from rich.progress import Progress

    encode, vocab_size, eod = _encoder(tokenizer, temp / "_tokenizer")
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
        "digest": _digest(paths.values()),
        "skipped": sorted(skipped),
        "splits": splits,
    }


def _publish(temp: Path, output: Path, record: dict[str, Any]) -> None:
    """Rename what is in `temp` to its place: every .idx after every .bin, the json last of all."""
    json_path = temp / ".json"
    json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    # First what makes the old files a data set goes, so that old and new are never mixed.
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


def _identity(tokenizer: str) -> str:
    """Return what tells a tokenizer from others: local ones by content, wherever they lie."""
    path = Path(tokenizer)
    if path.is_file():
        beside = path.with_name("tokenizer_config.json")
        parts = [p for p in (path, beside) if p.is_file()]
    elif path.is_dir():
        parts = [p for p in sorted(path.iterdir()) if p.suffix in {".json", ".model", ".txt"}]
    elif path.is_absolute() or path.suffix == ".json" or tokenizer.startswith("."):
        raise ValueError(f"tokenizer {tokenizer} does not exist; check --tokenizer")
    else:
        return tokenizer
    return f"{path.resolve().name} sha256:{_digest(parts)}"


def _digest(paths: Iterable[Path]) -> str:
    digests = []
    for path in paths:
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return _sha256("".join(digests))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `data` command to the parser of `sso-megatron`."""
    text = "turn text files into indexed datasets that Megatron trains on"
    parser = subparsers.add_parser("data", help=text, description=text)
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
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the `data` command; return 0, or 2 after a one-line error."""
    o = options
    try:
        shares = o.split.split(",")
        info = prepare(o.output, o.input, o.glob, o.tokenizer, shares, o.seed, o.force)
    except (ValueError, OSError) as error:
        print(f"sso-megatron data: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"train on it with: {shlex.join(info.megatron_arguments())}")
    return 0
