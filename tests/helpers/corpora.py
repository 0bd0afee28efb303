"""A small corpus with every byte, data sets made of it, and what Megatron reads in them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from sso_megatron.cli.data import command as data

EOD = 256
GLOBS = ("*.py", "*.txt")


def indexed_dataset() -> Any:
    """Megatron's module; late, since tests that are only collected do not wait for Megatron."""
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def write_corpus(folder: Path) -> Path:
    """42 usable files of uneven sizes, one of them not UTF-8, one empty, one of another kind."""
    rng = random.Random(7)
    for number in range(40):
        path = folder / f"part{number % 3}" / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(rng.choice("abc xyz\n<é>") for _ in range(rng.randint(1, 900)))
        path.write_text(text + " <|endoftext|> " * (number % 2), encoding="utf-8")
    (folder / "all_bytes.txt").write_bytes(bytes(range(256)))
    (folder / "plain.txt").write_text("plain\n")
    (folder / "empty.py").write_bytes(b"")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def make(corpus: Path, output: Path, **options: object) -> data.DatasetInfo:
    return data.prepare(output, [corpus], GLOBS, quiet=True, **options)


def names(info: data.DatasetInfo) -> dict[str, list[str]]:
    record = json.loads(Path(f"{info.output}.json").read_text())
    return {split: record["splits"][split]["files"] for split in data.SPLITS}


def documents(info: data.DatasetInfo) -> dict[str, list[int]]:
    """What Megatron reads: file name -> ids."""
    found: dict[str, list[int]] = {}
    for split, files in names(info).items():
        dataset = indexed_dataset().IndexedDataset(info.prefixes[split])
        assert len(dataset) == len(files) == info.files[split] == len(dataset.document_indices) - 1
        assert dataset.index.dtype is np.uint16
        assert dataset.sequence_lengths.sum() == info.tokens[split]
        found |= {name: dataset[i].tolist() for i, name in enumerate(files)}
    return found


def written(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".json"
    }
