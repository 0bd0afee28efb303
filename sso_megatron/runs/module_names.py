"""Finds module and layer in the names of weights and logical matrices."""

import re

_LAYER = re.compile(r"^(?P<stack>.*?)layers\.(?P<layer>\d+)\.(?P<module>.*)$")
_LABEL = re.compile(r"\[(?:expert\d+)?\.?(?P<label>[^\]]*?)\d*\]$")
_EXPERT = re.compile(r"(?<=experts\.)local_experts\.\d+\.|(?<=\.weight)\d+")


def place_of(name: str) -> tuple[str, int | None]:
    """Module and layer in a name, such as ``self_attention.linear_qkv.q`` and 3.

    The experts of a layer share a module, and so do the heads of a projection. The layer is None outside
    layers.
    """
    name = _LABEL.sub(lambda m: f".{m['label']}" if m["label"] else "", name)
    name = _EXPERT.sub("", name).replace(".weight", "")
    found = _LAYER.match(name)
    if found is None:
        return name, None
    return found["stack"].removeprefix("decoder.") + found["module"], int(found["layer"])
