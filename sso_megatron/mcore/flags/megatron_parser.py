"""Checks single flags and their values by Megatron's parser with ours, for ``sso-megatron render``."""

import argparse
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

_IS_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")


class FlagParser:
    """Says which flags exist and what values they take; ``enter()`` must have been called before."""

    def __init__(self) -> None:
        from megatron.training import arguments

        self.parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        arguments.add_megatron_arguments(self.parser)
        self._actions: Mapping[str, argparse.Action] = self.parser._option_string_actions

    @property
    def known(self) -> list[str]:
        """All flags that the parser has."""
        return list(self._actions)

    def setting(self, flag: str) -> str:
        """Return the name of the setting that a flag sets; flags of one setting override each other.

        Raises:
            ValueError: the flag does not exist.
        """
        self._check(flag)
        return self._actions[flag].dest

    def words(self, flag: str, value: str | list[str]) -> list[str]:
        """Return a flag and its values as words of a command line; none for a switch that is ``false``.

        Raises:
            ValueError: the flag does not exist, or does not take this value.
        """
        self._check(flag)
        values = value if isinstance(value, list) else [value]
        if self._actions[flag].nargs == 0:
            if values not in (["true"], ["false"]):
                raise ValueError(f"{flag} {' '.join(values)}: is a switch; give true or false")
            return [flag] if values == ["true"] else []
        if values in (["true"], ["false"]):
            raise ValueError(f"{flag} {values[0]}: takes a value and is no switch")
        words = [flag, *values]
        if len(values) == 1 and values[0].startswith("-") and not _IS_NUMBER.match(values[0]):
            words = [f"{flag}={values[0]}"]  # else it would be taken for a flag
        try:
            _, rest = self.parser.parse_known_args(words)
        except argparse.ArgumentError as error:
            raise ValueError(str(error)) from None
        if rest:
            raise ValueError(f"{flag} {' '.join(values)}: takes fewer values")
        return words

    def split(self, words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        """Yield each flag of a command line with its values, in the form that ``words`` takes.

        Raises:
            ValueError: the command line does not start with a flag, or a flag does not exist.
        """
        found: list[tuple[str, list[str]]] = []
        for word in words:
            if word.startswith("-") and not _IS_NUMBER.match(word):
                flag, equals, value = word.partition("=")
                found.append((flag, [value] if equals else []))
            elif found:
                found[-1][1].append(word)
            else:
                raise ValueError(f"{word}: stands before the first flag")
        for flag, values in found:
            self._check(flag)
            yield flag, values or (["true"] if self._actions[flag].nargs == 0 else [])

    def _check(self, flag: str) -> None:
        if flag not in self._actions:
            close = difflib.get_close_matches(flag, self._actions, n=1)
            hint = (
                f"did you mean {close[0]}?"
                if close
                else "python -m sso_megatron.pretrain_gpt --help has all"
            )
            raise ValueError(f"{flag}: no flag of Megatron's or ours; {hint}")
