"""A process that has imported Megatron once and forks real ranks on request.

Importing torch and Megatron takes some ten seconds; a fork takes none. Each request is one JSON line on
standard input, each answer one on standard output. Ranks are processes of their own with their own
rendezvous over Gloo, exactly as torchrun would start them.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def load(name: str) -> Callable[..., Any]:
    """A function by ``module:function``; a module that is not of the package is one of ``helpers``."""
    module, _, function = name.partition(":")
    module = module if module.startswith("sso_megatron.") else f"helpers.{module}"
    return getattr(importlib.import_module(module), function)


def run_rank(rank: int, request: dict[str, Any]) -> int:
    """What a child does: environment, output, then the request's functions."""
    folder = Path(request["folder"])
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    size = str(request["ranks"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
    os.environ |= {"LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(request["port"])} | request["env"]
    os.chdir(folder)
    sys.argv = ["pretrain_gpt.py", *request["argv"]]
    code = 1
    try:
        for name in request["calls"]:
            load(name)()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve(request: dict[str, Any]) -> list[int | None]:
    """Fork the ranks and wait; once one has failed the others get some seconds, then SIGKILL."""
    children = {}
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os._exit(run_rank(rank, request))
        children[pid] = rank
    codes: list[int | None] = [None] * request["ranks"]
    deadline = time.monotonic() + request["timeout"]
    while any(code is None for code in codes):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children[pid]] = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # workers that wrote its checkpoints
            if codes[children[pid]]:
                deadline = min(deadline, time.monotonic() + request.get("grace", 20))
        elif time.monotonic() > deadline:
            for child, rank in children.items():
                if codes[rank] is None:
                    os.kill(child, signal.SIGKILL)
                    with (Path(request["folder"]) / f"rank{rank}.log").open("a") as log:
                        print("zygote: killed; it should have ended by itself before now", file=log)
            deadline = math.inf
        else:
            time.sleep(0.02)
    return codes


def fork_checkpoint_writers() -> None:
    """Fork the server of a save's result queue: spawned, it would import for ten seconds."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    make_queue = functools.partial(filesystem_async.get_write_results_queue, mp_mode="fork")
    filesystem_async.get_write_results_queue = make_queue


def read_help_texts_once() -> None:
    """Megatron parses its own sources for the flags' help texts, most of what a rank's start costs."""
    from megatron.training import arguments
    from megatron.training.argument_utils import ArgumentGroupFactory

    read = ArgumentGroupFactory._get_field_docstrings
    texts = functools.cache(lambda config: read(object.__new__(ArgumentGroupFactory), config))
    ArgumentGroupFactory._get_field_docstrings = lambda self, config: texts(config)
    arguments.add_megatron_arguments(argparse.ArgumentParser())


def shuffle_mock_data_once() -> None:
    """Megatron shuffles six million samples of it in every rank, and in most runs the same ones."""
    from megatron.core.datasets import gpt_dataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    shuffle, known = gpt_dataset._build_shuffle_index, {}

    def shuffled(first: int, size: int, state: Any) -> Any:
        key = (first, size, state.get_state()[1].tobytes())
        if key not in known:
            known[key] = shuffle(first, size, state)
        return known[key]

    gpt_dataset._build_shuffle_index = shuffled
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1234,
        sequence_length=32,
        split="969, 30, 1",
        tokenizer=SimpleNamespace(vocab_size=128, eod=127, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    builder = BlendedMegatronDatasetBuilder(gpt_dataset.MockGPTDataset, [1, 1, 1], lambda: True, config)
    builder.build()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print must not be taken for an answer
    from sso_megatron.mcore import enter

    enter()
    for name in ("training", "training.models", "training.argument_utils", "core.models.mimo"):
        importlib.import_module(f"megatron.{name}")
    importlib.import_module("megatron.core.tokenizers.text.models")  # else transformers in every rank
    for name in ("metrics.loop_hooks", "optimizer.chain", "optimizer.layer_wise"):
        importlib.import_module(f"sso_megatron.mcore.{name}")
    importlib.import_module("sso_megatron.cli.train.pretrain_gpt")
    importlib.import_module("helpers.probes")
    fork_checkpoint_writers()
    read_help_texts_once()
    shuffle_mock_data_once()
    gc.freeze()  # else collections in a rank go through, and so copy, all that was imported
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
