"""The bridge to megatron, which only this package and ``cli`` import.

It holds registration, flags, layouts, checkpoints, records and the CPU rehearsal.
"""

from sso_megatron.mcore.entry import enter
from sso_megatron.mcore.optimizer.registration import register

__all__ = ["enter", "register"]
