"""Finds the files of a corpus, assigns each to a split, and makes what turns them into token ids."""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "valid", "test")
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
DEFAULT_GLOBS = ("*.py",)
BYTE_EOD = 256  # the first id after the 256 byte values, so byte-level has 257 ids
# Names that tokenizer files give their end of text; a bare tokenizer.json does not say which of its
# special tokens it is, so exactly one of these must be in its vocabulary.
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eod|>")
MAX_FILE_BYTES = 2**31 - 2  # Megatron's index stores a document's length, eod included, as int32

Skipped = list[tuple[str, str]]  # (name, reason)


class File(NamedTuple):
    """A file of a corpus."""

    name: str  # relative to its input, with "/": the same on every machine
    path: Path
    size: int
    mtime_ns: int


def find_files(
    inputs: Sequence[str | Path] | None, globs: Sequence[str]
) -> tuple[list[File], Skipped, int]:
    """Return the usable files by name, the others with the reason, and how many match no glob."""
    foreign = set() if inputs else {"site-packages", "dist-packages"}
    roots = [Path(i) for i in inputs or [STANDARD_LIBRARY]]
    candidates: dict[Path, str] = {}  # by real path: overlapping inputs give a file only once
    files: list[File] = []
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
    skipped: Skipped = [(error.filename, f"unreadable: {error}") for error in unreadable]
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
            files.append(File(name, path, status.st_size, status.st_mtime_ns))
    return files, skipped, unmatched


def assign_splits(files: list[File], shares: Sequence[float], seed: int) -> dict[str, list[File]]:
    """Give each file, in hashed order, to the emptiest split with room for it; none stays empty."""
    total = sum(f.size for f in files)
    target = {split: share * total for split, share in zip(SPLITS, shares, strict=True)}
    chosen: dict[str, list[File]] = {split: [] for split in SPLITS}
    held = dict.fromkeys(SPLITS, 0)
    # Largest first would balance better, but leave only small files to validation and test.
    for place, file in enumerate(sorted(files, key=lambda f: sha256(f"{seed}:{f.name}"))):
        empty = [split for split in SPLITS if not chosen[split]]
        excess = {s: max(0.0, held[s] + file.size - target[s]) for s in SPLITS}
        open_to_it = empty if len(files) - place <= len(empty) else SPLITS
        split = min(open_to_it, key=lambda s: (excess[s], held[s] / target[s], target[s]))
        chosen[split].append(file)
        held[split] += file.size
    return chosen


def make_encoder(tokenizer: str, folder: Path) -> tuple[Callable[[bytes], npt.NDArray[Any]], int, int]:
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


def identity(tokenizer: str) -> str:
    """Return a text that identifies a tokenizer: a local one by its contents, wherever it is."""
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
    return f"{path.resolve().name} sha256:{digest(parts)}"


def digest(paths: Iterable[Path]) -> str:
    """Return one SHA-256 over the contents of files, in the order given."""
    digests = []
    for path in paths:
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return sha256("".join(digests))


def sha256(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
