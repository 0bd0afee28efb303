"""A plan of ``sso-megatron plan``, and what the run that it is of really did."""

import json
from typing import Any

import pytest

from helpers.megatron_runs import Run

PLACE = ("stage", "tensor", "data", "expert_tensor", "expert_data")


def read(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "plan.json").read_text())


def assert_same_loads(planned: dict[str, Any], real: Run) -> None:
    """Flops of a warm step and bytes it receives, as counted on it, and bytes of the state."""
    loads = {tuple(rank[key] for key in PLACE): rank["load"] for rank in planned["ranks"]}
    counted = (real.saved(name) for name in ("place", "flops", "received", "bytes"))
    for place, flops, received, kept in zip(*counted, strict=True):
        load = loads[tuple(place[key] for key in PLACE)]
        assert load["flops"] == pytest.approx(flops, rel=1e-6)
        if planned["is_sharded"]:
            # The optimizer gathers weights over data-parallel ranks as it steps.
            assert all(cut["mode"] == "owner" for cut in planned["cuts"])
            del received["all_gather"]
        assert load["received"] == received.total()
        assert load["momentum"] == kept["momentum"]
        if planned["is_sharded"] and place["data"]:  # AdamW's parameters are cut anywhere, but aligned
            assert all(abs(kept[name] - load[name]) <= 1024 for name in ("adamw", "masters"))
        else:
            assert (load["adamw"], load["masters"]) == (kept["adamw"], kept["masters"])
