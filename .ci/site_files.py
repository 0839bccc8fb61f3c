"""Takes files outside docs/ into the site, if a page links to them: a hook of mkdocs.yml.

A document of the repository, such as CONTRIBUTING.md, becomes a page below source/. Another file, such as an example,
gets a page with its text. So every link works in the repository and in the site, without an address on the web.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS, SOURCE = "docs/", "source/"
LINK = re.compile(r"(\[[^\]]*)(\]\()([^)\s#:]+)(#[^)\s]*)?\)")
LANGUAGES = {".diff": "diff", ".py": "python", ".toml": "toml", ".ts": "ts", ".yaml": "yaml", ".yml": "yaml"}


def in_repository(page: str) -> str:
    """The file of the repository that a page of the site shows, both with slashes."""
    if not page.startswith(SOURCE):
        return DOCS + page
    inner = page.removeprefix(SOURCE)
    return inner if (ROOT / inner).is_file() else inner.removesuffix(".md")


def in_site(file: str) -> str:
    """The page of the site that shows a file of the repository; of files in docs/ themselves."""
    if file.startswith(DOCS):
        return file.removeprefix(DOCS)
    return SOURCE + (file if file.endswith(".md") else f"{file}.md")


def outside(page: str, text: str) -> set[str]:
    """The files outside docs/ that a page links to."""
    folder = posixpath.dirname(in_repository(page))
    linked = {posixpath.normpath(posixpath.join(folder, target)) for _, _, target, _ in LINK.findall(text)}
    return {file for file in linked if not file.startswith((DOCS, "..")) and (ROOT / file).is_file()}


def content(file: str) -> str:
    """The page for a file of the repository."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".md"):
        return text
    return f"# {file}\n\n````{LANGUAGES.get(Path(file).suffix, 'text')}\n{text.rstrip()}\n````\n"


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file that a page links to, and for those that the new pages link to."""
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        page, text = waiting.pop()
        for file in sorted(outside(page, text)):
            if (uri := in_site(file)) not in files.src_uris:
                files.append(File.generated(config, uri, content=content(file)))
                if file.endswith(".md"):
                    waiting.append((uri, content(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Have the links of a page lead to pages of the site, and the search find documents before measurements."""
    here = page.file.src_uri
    if here.startswith((SOURCE, "results/")):
        page.meta.setdefault("search", {"boost": 0.1})  # the documents themselves come first
    folder = posixpath.dirname(in_repository(here))

    def moved(link: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(folder, link[3]))
        if not file.startswith("..") and (ROOT / file).is_dir():
            return link[1][1:]  # a folder has no page: its name stays
        if file.startswith("..") or not (ROOT / file).is_file():
            return link[0]
        target = os.path.relpath(in_site(file), posixpath.dirname(here) or ".").replace(os.sep, "/")
        return f"{link[1]}{link[2]}{target}{link[4] or ''})"

    return LINK.sub(moved, markdown)
