"""The files of a run: plain text, one line at a time, for whoever reads along.

- ``run.json``: what is trained how, written at the start.
- ``metrics.jsonl``: a line for each iteration, with the loss; where measured, headlines and alarms.
- ``measures.jsonl``: all that was measured, by row: the names of rows in a line of their own, then a line
  for each measured iteration with a list for each column.
- ``summary.json``: how it ended.

null is not known or not a number, 1e999 infinite.
"""

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sso_megatron.mcore import compat
from sso_megatron.mcore.arguments import config_from, configs_from, group_sizes
from sso_megatron.mcore.kinds import OPTIMIZERS
from sso_megatron.mcore.tables import Tables
from sso_megatron.version import __version__

# What of Megatron's own arguments two runs most often differ in.
_TRAINING = (
    *("lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "clip_grad", "seed"),
    *("global_batch_size", "seq_length", "num_layers", "hidden_size"),
)


def _precision(args: Any) -> str:
    return next((name for name in ("bf16", "fp16") if getattr(args, name)), "fp32")


def describe(args: Any) -> dict[str, Any]:
    """What ``run.json`` says of a run with Megatron's validated arguments."""
    is_ours = args.optimizer in OPTIMIZERS
    varies = args.rampup_batch_size or args.step_batch_size_schedule
    settings, shared = configs_from(args) if is_ours else (None, config_from(args, "spectral"))
    return {
        "optimizer": args.optimizer,
        "train_iters": args.train_iters,
        "log_interval": args.log_interval,
        "metrics_interval": args.log_spectral_metrics,
        "world_size": args.world_size,
        "parallel": group_sizes(args),
        "tokens_per_iteration": None if varies else args.global_batch_size * args.seq_length,
        # Whoever reads it may be in another folder.
        "save": args.save and os.path.abspath(args.save),
        "training": {
            **{name: getattr(args, name) for name in _TRAINING},
            "adamw_weight_decay": args.weight_decay,
            "precision": _precision(args),
        },
        "settings": dataclasses.asdict(settings) if settings else None,
        "shared": dataclasses.asdict(shared),
        "started": time.time(),
        "versions": {
            "sso-megatron": __version__,
            "torch": torch.__version__,
            "megatron-core": compat.megatron_version(),
        },
    }


_BLOCK = 1 << 16


class RunFiles:
    """Writes them; a full disk is told of and does not end the training."""

    def __init__(self, folder: Path) -> None:
        """Take the folder, which must exist."""
        self.folder = folder
        self._rows: dict[str, list[str]] | None = None

    def write_run(self, record: dict[str, Any]) -> None:
        """Write ``run.json``."""
        self._try("run.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))

    def append_lines(self, lines: list[dict[str, Any]]) -> None:
        """Append to ``metrics.jsonl``."""
        text = "".join(_json(line) + "\n" for line in lines)
        self._try("metrics.jsonl", lambda path: _append(path, text))

    def append_measures(self, iteration: int, time: float, lr: float | None, tables: Tables) -> None:
        """Append to ``measures.jsonl``."""
        text, rows = "", {name: list(table.rows) for name, table in tables.items()}
        if rows != self._rows:
            text = json.dumps({"tables": rows}) + "\n"
        parts = [f'"iteration": {iteration}', f'"time": {time:.3f}', f'"lr": {json.dumps(lr)}']
        for name, table in tables.items():
            columns = ", ".join(f'"{key}": {_numbers(column)}' for key, column in table.columns.items())
            parts.append(f'"{name}": {{{columns}}}')
        text += "{" + ", ".join(parts) + "}\n"
        if self._try("measures.jsonl", lambda path: _append(path, text)):
            self._rows = rows

    def read_summary(self) -> dict[str, Any]:
        """What ``summary.json`` says; nothing where there is none."""
        try:
            found = json.loads((self.folder / "summary.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_summary(self, record: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        self._try("summary.json", lambda path: path.write_text(_json(record) + "\n"))

    def _try(self, name: str, write: Callable[[Path], object]) -> bool:
        try:
            write(self.folder / name)
        except OSError as error:
            print(f"sso_megatron: records in {name} not written: {error}", flush=True)
            return False
        return True


def _json(value: Any) -> str:
    """JSON, which has neither NaN nor infinity, by the module's rule."""
    return re.sub(r'"(-?1e999)"', r"\1", json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else _number(value)


def _numbers(values: np.ndarray) -> str:
    """A JSON list with six digits."""
    if values.ndim > 1:
        return "[" + ",".join(map(_numbers, values)) + "]"
    return "[" + ",".join(map(_number, values.tolist())) + "]"


def _number(value: float) -> str:
    if math.isfinite(value):
        return f"{value:.6g}"
    return "null" if math.isnan(value) else f"{'-' if value < 0 else ''}1e999"


def _append(path: Path, text: str) -> None:
    """Add whole lines; one that a killed run, or a full disk, has left unfinished is taken away."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole:
            start = max(0, whole - _BLOCK)
            file.seek(start)
            place = file.read(whole - start).rfind(b"\n")
            whole = start + place + 1
            if place >= 0:
                break
        if whole < end:
            file.truncate(whole)
        file.write(text.encode())
