"""The order of names: layer 2 before layer 10."""

import re


def natural_order(name: str) -> tuple[int | str, ...]:
    """Key to sort names by, layer 2 before layer 10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))
