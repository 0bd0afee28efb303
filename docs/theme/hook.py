"""Gives MkDocs the repository's own paths, so that a relative link means the same in the site."""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "configs", "docs", "launch", "patches")
"""What pages may link to, beside the top-level pages and the license."""

_AS_THEY_ARE = (".md", ".png", ".svg", ".css", ".js")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of ``docs`` by those of the repository, ``docs/`` being part of their paths."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in _published():
        name = path.relative_to(ROOT).as_posix()
        # A browser shows text and downloads what it does not know, such as a shell script.
        target = None if path.suffix in _AS_THEY_ARE else f"{name}.txt"
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=target))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Drop the backslash before a bar in a table's code, as GitHub does."""
    return re.sub(r"<td.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), html, flags=re.DOTALL)


def _published() -> Iterator[Path]:
    yield from sorted(ROOT.glob("*.md"))
    yield from (ROOT / "LICENSE", ROOT / "tests" / "README.md")
    for folder in FOLDERS:
        found = sorted(path for path in (ROOT / folder).rglob("*") if path.is_file())
        yield from (path for path in found if "__pycache__" not in path.parts)
