"""Where the project's files are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sso_megatron"
TESTS = ROOT / "tests"
SCRIPTS = TESTS / "helpers" / "scripts"
"""What tests start by its path."""
WHEELS = ROOT / ".wheels"
"""Versions of Megatron-Core that ``make wheels`` fetches."""
