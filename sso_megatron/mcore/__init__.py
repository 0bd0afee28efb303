"""All that knows Megatron, which only this package and ``cli`` import.

Its rooms are the flags, parameters, optimizers, checkpoints, metrics and plans of a run, checkpoints
outside of a run, and the CPU rehearsal.
"""

from sso_megatron.mcore.entry import enter
from sso_megatron.mcore.optimizer.registration import prepare_for_shards, register

__all__ = ["enter", "prepare_for_shards", "register"]
