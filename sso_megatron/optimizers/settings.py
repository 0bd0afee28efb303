"""How a setting is declared, checked and described; the settings themselves are in ``config``."""

import dataclasses
import math
import typing
from dataclasses import field
from typing import Any, Literal


def setting(default: Any, help: str, source: str = "") -> Any:
    """A dataclass field with what its flag's help and the documentation say about it."""
    return field(default=default, metadata={"help": help, "source": source})


def require(config: Any, name: str, ok: bool, rule: str) -> None:
    """Raise ValueError with the setting's name, its value, the rule and the default unless ``ok``."""
    if not ok:
        raise ValueError(
            f"{name}={getattr(config, name)!r} {rule}; the default is {default_of(type(config), name)!r}"
        )


def default_of(config_type: type, name: str) -> Any:
    """The default of one field of a configuration dataclass."""
    return next(f.default for f in dataclasses.fields(config_type) if f.name == name)


def choices_of(config_type: type, name: str) -> tuple[Any, ...]:
    """The values that a ``Literal`` field may take; empty for another field."""
    hint = typing.get_type_hints(config_type)[name]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def check_choices(config: Any) -> None:
    """``require`` of every ``Literal`` field that it has one of its values."""
    for f in dataclasses.fields(config):
        choices = choices_of(type(config), f.name)
        if choices:
            listed = ", ".join(map(str, choices))
            require(config, f.name, getattr(config, f.name) in choices, f"must be one of {listed}")


def check_positive(config: Any, *names: str) -> None:
    """``require`` of the fields named that they are positive and finite."""
    for name in names:
        is_positive = 0 < getattr(config, name) < math.inf
        require(config, name, is_positive, "must be positive and finite")


def one_config[C](config_type: type[C], config: C | None, settings: dict[str, Any]) -> C:
    """The configuration given as an object, or made from settings by name.

    Raises:
        TypeError: both were given, or a setting does not exist.
    """
    if config is not None and settings:
        raise TypeError(f"give config or {', '.join(settings)}, not both")
    return config if config is not None else config_type(**settings)
