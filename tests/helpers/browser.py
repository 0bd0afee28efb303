"""A real headless browser for pages that the project writes."""

import html
import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from helpers.processes import HANGS_AFTER

# Whom a Chromium asks by itself, whatever it shows.
_ITS_OWN = re.compile(r"(//|\s)(accounts|clients\d|update|optimizationguide-pa)\.google(apis)?\.com[:/]")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The browser of this machine: SSO_BROWSER, else a Chromium in PATH."""
    named = os.environ.get("SSO_BROWSER")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Page:
    """What a browser made of a page.

    Attributes:
        dom: the document's HTML after it was loaded.
        messages: of its console: errors and warnings.
        requests: everything that it asked a network for, but what browsers ask for themselves.
    """

    dom: str
    messages: list[str]
    requests: list[str]

    @property
    def text(self) -> str:
        """Text of the document without its tags."""
        return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", self.dom)))


class Browser:
    """Opens files; every request that leaves them ends in a proxy that notes it."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program = program
        self.folder = folder
        self.requests: list[str] = []
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _noting(self.requests))
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()

    def open(self, page: Path, *flags: str, query: str = "") -> Page:
        """Load a page, with further flags of the browser, or with a query in its address."""
        self.requests.clear()
        ended = self._run(*flags, "--dump-dom", page.resolve().as_uri() + query)
        messages = [line for line in ended.stderr.splitlines() if ":CONSOLE" in line]
        return Page(ended.stdout, messages, list(self.requests))

    def screenshot(self, page: Path, path: Path, width: int = 1280, height: int = 1000) -> Image.Image:
        """The top of the page as a picture, also written to ``path``."""
        size = f"--window-size={width},{height}"
        self._run(size, "--hide-scrollbars", f"--screenshot={path}", page.resolve().as_uri())
        return Image.open(path)

    def _run(self, *flags: str) -> "subprocess.CompletedProcess[str]":
        command = [
            *(self.program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--no-first-run", "--disable-default-apps", "--disable-extensions"),
            *("--enable-logging=stderr", "--virtual-time-budget=2000"),
            *(f"--user-data-dir={self.folder / 'profile'}", "--proxy-bypass-list=<-loopback>"),
            *(f"--proxy-server=http://127.0.0.1:{self._proxy.server_port}", *flags),
        ]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return ended


def _noting(requests: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            request = f"{self.command} {self.path}"
            if not _ITS_OWN.search(request):
                requests.append(request)
            self.send_error(404)

        do_GET = do_POST = do_HEAD = do_CONNECT = refuse

        def log_message(self, *args: object) -> None:
            pass

    return Handler
