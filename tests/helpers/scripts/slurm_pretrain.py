"""Our training script for test_slurm.py: it waits, crashes or goes wrong where the environment says.

HOLD     a folder: an iteration whose number is a file in there waits until that file is gone, or until
         Megatron has got the signal to leave
FAULT    ``crash``: exit code 1 at once; ``spoil``: no gradient is finite
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from sso_megatron.cli.train import pretrain_gpt

_HOLD = Path(os.environ["HOLD"])
_forward_step = pretrain_gpt.forward_step


def forward_step(*args: Any, **named: Any) -> Any:
    from megatron.training import get_args, get_signal_handler

    file = _HOLD / str(get_args().curr_iteration + 1)
    while file.exists() and not get_signal_handler()._signal_received:
        time.sleep(0.1)
    return _forward_step(*args, **named)


if __name__ == "__main__":
    fault = os.environ.get("FAULT")
    if fault == "crash":
        sys.exit(1)
    if fault == "spoil":
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from helpers.probes import metrics

        metrics.spoil_all()
    pretrain_gpt.forward_step = forward_step
    pretrain_gpt.main()
