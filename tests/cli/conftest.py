"""Tiny runs with records, for the tests of their pictures."""

from pathlib import Path

import pytest

from helpers.megatron_runs import MOE, Megatron, tiny

EVERY = ["--log-spectral-metrics", 2, "--train-iters", 6, "--spectral-mup-init"]


@pytest.fixture(scope="session")
def dense(megatron: Megatron) -> Path:
    argv = tiny(*EVERY, "--log-spectral-criterion", 3, "--eval-iters", 1, tp=2)
    return megatron.train(argv, 2).folder


@pytest.fixture(scope="session")
def moe(megatron: Megatron) -> Path:
    return megatron.train(tiny(*MOE, *EVERY)).folder


@pytest.fixture(scope="session")
def spectra(megatron: Megatron) -> Path:
    argv = tiny("--log-spectral-metrics", 3, "--train-iters", 6, optimizer="spectra")
    return megatron.train(argv).folder


@pytest.fixture(scope="session")
def adam(megatron: Megatron) -> Path:
    """A run that has recorded its loss alone."""
    return megatron.train(tiny(optimizer="adam")).folder
