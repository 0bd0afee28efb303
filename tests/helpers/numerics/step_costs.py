"""What a step of an optimizer costs: temporary memory, and waits for the device."""

from typing import Any

import torch

from sso_megatron.cli.bench.meters import HostSyncs, PeakMemory


def draw_gradients(params: list[torch.nn.Parameter]) -> None:
    for param in params:
        param.grad = torch.randn_like(param)


def assert_workspace(kind: Any, shape: tuple[int, int], least: float, **settings: Any) -> None:
    """A warm step on two matrices takes no more than it says, and at least the part ``least`` of it."""
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(2)]
    optimizer = kind(params, **settings)
    draw_gradients(params)
    optimizer.step()
    with PeakMemory() as memory:
        optimizer.step()
    said = 2 * optimizer.workspace(shape, torch.float32)
    assert least * said < memory.peak_bytes <= said


def assert_waits_once(kind: Any, shapes: list[tuple[int, int]], **settings: Any) -> None:
    """The first step waits for the device, and no other one."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = kind(params, **settings)
    for number in range(4):
        draw_gradients(params)
        with HostSyncs() as syncs:
            optimizer.step()
        assert (syncs.count > 0) == (number == 0), syncs.sources
