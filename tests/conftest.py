"""Fixtures of all tests, and the markers that follow from them."""

from collections.abc import Iterator

import pytest
import torch

from helpers import browser as browsers
from helpers.megatron_runs import Megatron, zygote

_MARKERS = {
    "megatron": "megatron",
    "other": "megatron",
    "browser": "browser",
    "cluster": "slurm",
    "ended": "slow",
    "site": "slow",
}
"""The marker of every test that asks for a fixture, itself or through another one."""

_FIRST = (
    "test_every_layout.py",
    "test_slurm.py",
    "test_plan.py",
    "test_distributed_optimizer.py",
    "test_docs.py",
    "test_bf16_layouts.py",
    "test_commands.py",
)
"""The files that take longest: workers begin with them, and short ones fill up what is left."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by fixtures, skip those of a GPU where there is none, put the longest files first."""
    has_cuda = torch.cuda.is_available()
    place = {name: number for number, name in enumerate(_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(_FIRST)))
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in _MARKERS:
                item.add_marker(_MARKERS[fixture])
        if item.get_closest_marker("gpu") and not has_cuda:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Megatron]:
    """Starts runs of real ranks."""
    with zygote(tmp_path_factory.mktemp("megatron")) as started:
        yield started


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    """A real browser; the test is skipped where there is none."""
    program = browsers.find()
    if program is None:
        pytest.skip(
            f"no browser: none of {', '.join(browsers.NAMES)} is in PATH, and SSO_BROWSER is not set"
        )
    opened = browsers.Browser(program, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()
