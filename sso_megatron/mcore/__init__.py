"""The only package that imports megatron: registration, flags, layouts, CPU rehearsal, records."""

from sso_megatron.mcore.entry import enter
from sso_megatron.mcore.optimizer.registration import register

__all__ = ["enter", "register"]
