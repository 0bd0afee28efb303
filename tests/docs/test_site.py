"""The documentation as a site: it builds strictly, links hold, and a browser shows it."""

import html
import json
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from helpers.browser import Browser, Page
from helpers.paths import ROOT
from helpers.processes import HANGS_AFTER

FOLDERS = runpy.run_path(str(ROOT / "docs" / "theme" / "hook.py"))["FOLDERS"]
SOURCES = [
    *ROOT.glob("*.md"),
    ROOT / "tests" / "README.md",
    *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")),
]
HOSTS = {
    "arxiv.org",
    "developercertificate.org",
    "github.com",
    "keepachangelog.com",
    "matplotlib.org",
    "semver.org",
    "www.apache.org",
}
"""That pages link to. Nothing here asks them: open a link by hand before its host is added."""


def build(folder: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    command = [f"{sysconfig.get_path('scripts')}/mkdocs", "build", "--strict"]
    return subprocess.run(
        [*command, "--site-dir", str(site)],
        cwd=folder,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT, folder)
    assert result.returncode == 0, result.stderr
    return folder


def built(site: Path, source: Path) -> Path:
    name = source.relative_to(ROOT).with_suffix(".html")
    return site / (name.with_name("index.html") if name.stem == "README" else name)


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = {built(site, source) for source in SOURCES}
    assert pages == set(site.rglob("*.html")) - {site / "404.html"}
    assert (site / "LICENSE.txt").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_strict_build_finds_what_is_wrong(tmp_path: Path) -> None:
    """Links, anchors, pictures and pages without a place in the navigation are nobody else's to check."""
    copy = tmp_path / "copy"
    for path in ("mkdocs.yml", "LICENSE", "docs", *(source.relative_to(ROOT) for source in SOURCES)):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        is_folder = (ROOT / path).is_dir()
        (shutil.copytree if is_folder else shutil.copy2)(ROOT / path, copy / path)
    assert build(copy, tmp_path / "good").returncode == 0
    wrong = ["nowhere.md", "quickstart.md#nowhere", "../nowhere.md", "/docs/quickstart.md", "../configs"]
    links = "".join(f"[a link]({target})\n" for target in wrong)
    (copy / "docs" / "planning.md").write_text(f"# Planning\n\n{links}![a picture](images/none.png)\n")
    (copy / "docs" / "lost.md").write_text("# In no navigation\n")
    result = build(copy, tmp_path / "bad")
    assert result.returncode == 1
    for target in [*wrong, "images/none.png", "docs/lost.md"]:
        assert re.search(rf"(?<![\w/.]){re.escape(target)}(?![\w/])", result.stderr), target


def without_code(source: Path) -> str:
    text = source.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_anchors_are_those_of_github(site: Path) -> None:
    """So that a link that holds in the site holds there, too."""
    for source in SOURCES:
        headings = re.findall(r"^#{1,6} (.+)$", without_code(source), re.MULTILINE)
        wanted = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        page = built(site, source).read_text(encoding="utf-8")
        assert re.findall(r'<h[1-6] id="([^"]*)"', page) == wanted, source


def test_tables_have_the_same_columns_everywhere(site: Path) -> None:
    """GitHub ends a cell at every bar without a backslash, inside code as well."""
    for source in SOURCES:
        rows = [line for line in without_code(source).splitlines() if line.startswith("|")]
        cells = [len(re.findall(r"(?<!\\)\|", row)) - 1 for row in rows]
        page = built(site, source).read_text(encoding="utf-8")
        shown = [len(re.findall(r"<t[hd]\b", row)) for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)]
        lines = [count for row, count in zip(rows, cells, strict=True) if not re.fullmatch(r"[|:-]+", row)]
        assert shown == lines, source
        assert r"\|" not in re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL), source


def test_external_links() -> None:
    """Their form alone: no other host is asked here."""
    for source in SOURCES:
        text = without_code(source)
        for scheme, host in re.findall(r"\b(\w+)://([^/\s)>`]+)", text):
            assert (scheme, host in HOSTS) == ("https", True), f"{source.name}: {scheme}://{host}"
        for shown, number in re.findall(r"([\d.]+)\]\(https://arxiv\.org/abs/([^)]*)\)", text):
            assert shown == number, f"{source.name}: arXiv {shown} leads to {number}"
        assert not re.search(r"\]\(https://arxiv\.org/(?!abs/\d{4}\.\d{5}\))", text), source


# ---------------------------------------------------------------- in a browser


FRAMES = """<!doctype html><meta charset="utf-8"><pre id="found"></pre>
<script>
const pages = %s;
const found = document.getElementById("found");
for (const page of pages) {
  const frame = document.createElement("iframe");
  frame.width = %d; frame.height = 800; frame.src = page;
  frame.onload = () => {
    const inner = frame.contentDocument, root = inner.documentElement;
    const dead = [...inner.images].filter((image) => !image.naturalWidth).map((image) => image.src);
    found.append(JSON.stringify({page, wide: root.scrollWidth, room: root.clientWidth, dead}) + "\\n");
  };
  document.body.append(frame);
}
</script>
"""


def look(browser: Browser, folder: Path, width: int) -> tuple[Page, list[dict[str, Any]]]:
    """All pages of a folder in frames of one page, and what each frame is like."""
    pages = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.html"))
    frames = folder / f"frames{width}.htm"
    frames.write_text(FRAMES % (json.dumps(pages), width), encoding="utf-8")
    page = browser.open(frames, "--allow-file-access-from-files")
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', page.dom, re.DOTALL)
    found = [json.loads(line) for line in html.unescape(text).splitlines()]
    assert sorted(one["page"] for one in found) == pages
    return page, found


@pytest.mark.parametrize("width", [400, 1280])
def test_every_page_in_a_browser(browser: Browser, site: Path, width: int) -> None:
    """No error, no request to a host, no picture missing, and nothing wider than a phone."""
    page, found = look(browser, site, width)
    for one in found:
        assert one["wide"] <= one["room"], one
        assert not one["dead"], one
    assert page.messages == []
    assert page.requests == []


def test_the_browser_would_tell(browser: Browser, tmp_path: Path) -> None:
    body = "<img src=none.png><div style='width:900px'>wide</div><script>none()</script>"
    (tmp_path / "bad.html").write_text(f"<link rel=stylesheet href=http://example.org/a.css>{body}")
    page, (found,) = look(browser, tmp_path, 400)
    assert found["wide"] > found["room"]
    assert found["dead"] == [(tmp_path / "none.png").as_uri()]
    assert any("none is not defined" in message for message in page.messages)
    assert any("example.org/a.css" in request for request in page.requests)


def test_search_works_without_a_server(browser: Browser, site: Path) -> None:
    page = browser.open(site / "index.html", query="?q=retraction")
    assert re.search(r"\d+ matching documents", page.text)
    assert re.search(r'href="[^"]*docs/algorithms/sso\.html\?h=', page.dom)
    assert page.messages == []
    assert page.requests == []
