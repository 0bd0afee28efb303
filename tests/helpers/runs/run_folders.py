"""Folders of runs as ``sso-megatron watch`` meets them, line by line."""

import json
import time
from pathlib import Path
from typing import Any

from sso_megatron.runs.live_state import RunState

WEIGHT = "decoder.layers.3.self_attention.linear_qkv.weight[q2]"
OFF_RADIUS = (
    f"radius: {WEIGHT}: +12.00% off its radius, limit 5.00% from its step size; see what writes to it"
)
HEALTHY = {
    "radius_error": 0.01,
    "not_converged": 0,
    "activation_rms": 1.1,
    "logit_max": 9.0,
    "max_vio": None,
}


def begin(folder: Path, **info: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    known = {"optimizer": "sso", "train_iters": 40, "log_interval": 5, "world_size": 2,
             "parallel": {"tensor": 2, "expert": 1, "expert_tensor": 2, "data": 1},
             "tokens_per_iteration": 2048, "started": time.time()}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(known | info))


def record(iteration: int, at: float | None = None, **more: object) -> dict[str, Any]:
    """A line; those of an interval, every fifth, are measured."""
    line = {"iteration": iteration, "loss": 6.0 - iteration / 10, "time": time.time() if at is None else at}
    if iteration % 5 == 0:
        line |= {"lr": 0.02, "grad_norm": 0.25, "headlines": HEALTHY, "alarms": []}
    return line | more


def append(folder: Path, *records: dict[str, Any] | str) -> None:
    """Write lines as a run does, all of an interval at once; a text as it is."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))


def interval(start: int, at: float | None = None, **last: object) -> list[dict[str, Any]]:
    return [*(record(start + i, at) for i in range(4)), record(start + 4, at, **last)]


def state_of(folder: Path) -> RunState:
    state = RunState(folder)
    state.poll()
    return state
