"""``sso-megatron data``: text files as Megatron's indexed data sets.

``prepare`` and ``load`` are the same from Python; docs/data.md shows them.
"""

from sso_megatron.cli.data.command import load, prepare

__all__ = ["load", "prepare"]
