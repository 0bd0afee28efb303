"""Tiny runs with records, for the tests of their pictures, and the records as they stand there."""

import json
from pathlib import Path

import pytest
from conftest import MOE, Megatron, tiny

EVERY = ["--log-spectral-metrics", 2, "--train-iters", 6, "--spectral-mup-init"]


@pytest.fixture(scope="module")
def dense(megatron: Megatron) -> Path:
    argv = tiny(*EVERY, "--log-spectral-criterion", 3, "--eval-iters", 1, tp=2)
    return megatron.train(argv, 2).folder


@pytest.fixture(scope="module")
def moe(megatron: Megatron) -> Path:
    return megatron.train(tiny(*MOE, *EVERY)).folder


@pytest.fixture(scope="module")
def spectra(megatron: Megatron) -> Path:
    argv = tiny("--log-spectral-metrics", 3, "--train-iters", 6, optimizer="spectra")
    return megatron.train(argv).folder


@pytest.fixture(scope="module")
def adam(megatron: Megatron) -> Path:
    """A run that has recorded its loss alone."""
    return megatron.train(tiny(optimizer="adam")).folder


def lines(folder: Path, name: str) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def measured(folder: Path, table: str, column: str) -> tuple[list[str], dict[int, list[float]]]:
    """Names of the rows, and the numbers by iteration, read without the package."""
    head, *rest = lines(folder, "measures.jsonl")
    return head["tables"][table], {line["iteration"]: line[table][column] for line in rest}
