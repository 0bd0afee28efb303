"""The content of ``run.json``: a run's optimizer, settings, layout and versions."""

import dataclasses
import os
import time
from typing import Any

import torch

from sso_megatron.mcore.compat import versions
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS
from sso_megatron.mcore.flags.parser import config_from, configs_from, group_sizes
from sso_megatron.version import __version__

# Megatron's own arguments that most often differ between two runs.
_TRAINING = (
    *("lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "clip_grad", "seed"),
    *("global_batch_size", "seq_length", "num_layers", "hidden_size"),
)


def _precision(args: Any) -> str:
    return next((name for name in ("bf16", "fp16") if getattr(args, name)), "fp32")


def describe(args: Any) -> dict[str, Any]:
    """Return the content of ``run.json`` for a run with Megatron's validated arguments."""
    is_ours = args.optimizer in OPTIMIZERS
    varies = bool(args.step_batch_size_schedule)
    settings, shared = configs_from(args) if is_ours else (None, config_from(args, "spectral"))
    return {
        "optimizer": args.optimizer,
        "train_iters": args.train_iters,
        "log_interval": args.log_interval,
        "metrics_interval": args.log_spectral_metrics,
        "world_size": args.world_size,
        "parallel": group_sizes(args),
        "tokens_per_iteration": None if varies else args.global_batch_size * args.seq_length,
        # A reader may run in another folder.
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
            "megatron-core": versions.megatron_version(),
        },
    }
