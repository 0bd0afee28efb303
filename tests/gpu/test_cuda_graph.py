"""A warm step in a real CUDA graph: each replay equals an eager step to the last bit."""

from typing import Any

import pytest
import torch

from helpers.numerics.recorded_steps import SETTINGS, Training, assert_same

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_replayed_steps_equal_eager_ones(
    kind: Any, settings: dict[str, Any], split: bool, dtype: torch.dtype
) -> None:
    captured, eager = (Training(kind, split, "cuda", dtype, **settings) for _ in range(2))
    side = torch.cuda.Stream()
    for step in range(2):
        for training in (captured, eager):
            training.prepare(step)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                training.optimizer.step()
            torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    for step in range(2, 6):
        captured.prepare(step)
        graph.replay()
        eager.prepare(step)
        eager.optimizer.step()
        assert_same(captured.everything(), eager.everything())
