"""A command on a pseudo-terminal, and its screen as a user sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import pyte

from helpers.processes import HANGS_AFTER


class Terminal:
    """Runs a command that believes to be on a terminal of the given size."""

    def __init__(
        self, command: list[str], columns: int = 80, rows: int = 24, env: Mapping[str, str] = os.environ
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self.written = b""
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        # Workers of pytest have a size in their environment, which programs believe before the terminal's.
        environment = {name: env[name] for name in env if name not in ("LINES", "COLUMNS")}
        environment.setdefault("TERM", "xterm-256color")
        # A session of its own whose terminal this is, so that Ctrl-C reaches it. A shell that runs tests in
        # the background has it ignored, which is inherited.
        start = ["env", "--default-signal=INT", "setsid", "--ctty"]
        self.process = subprocess.Popen(
            [*start, *command], stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self, seconds: float) -> bool:
        """Draw what comes; False when nobody writes any more."""
        if select.select([self._master], [], [], seconds)[0]:
            try:
                written = os.read(self._master, 65536)
            except OSError:  # how Linux says that the other side is closed
                return False
            self.written += written
            self._stream.feed(written)
        return True

    @property
    def lines(self) -> list[str]:
        """The screen's lines that are not empty, from the top."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def wait_for(self, *texts: str, seconds: float = HANGS_AFTER) -> list[str]:
        """Wait until all texts are on the screen; return its lines."""
        return self.wait_until(lambda: all(text in "\n".join(self.lines) for text in texts), seconds, texts)

    def wait_until(
        self, holds: Callable[[], bool], seconds: float = HANGS_AFTER, what: object = ""
    ) -> list[str]:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"{what} not within {seconds} s on\n" + "\n".join(self.lines)
            if not self._read(0.2) and not holds():
                raise AssertionError(f"{what} not on the last screen\n" + "\n".join(self.lines))
        return self.lines

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def finish(self, seconds: float = HANGS_AFTER) -> int:
        """Read to the end and return the exit code."""
        end = time.monotonic() + seconds
        while self._read(0.2):
            assert time.monotonic() < end, "still running on\n" + "\n".join(self.lines)
        return self.process.wait(timeout=seconds)
