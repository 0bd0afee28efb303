"""The device of a rank's tensors."""

from collections.abc import Iterable
from typing import Any

import torch


def device_of(model_chunks: Iterable[Any]) -> torch.device:
    """Return the device of this rank's model chunks, where collectives over Megatron's groups need tensors.

    A rank may have no loss, no matrix and no optimizer state, but it always has some of the model. Should
    that have no parameters, this is the device that Megatron has chosen for the process.

    Args:
        model_chunks: Megatron modules, wrapped or not.
    """
    for chunk in model_chunks:
        for param in chunk.parameters():
            device: torch.device = param.device
            return device
    return torch.empty(0, device=torch.cuda.current_device()).device
