"""Find the files that a user names by files, folders and globs."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from lmcache_rag.documents.access import access_error, quoted, special_error
from lmcache_rag.errors import DocumentError

logger = logging.getLogger("lmcache_rag.documents")

# Files without text that are common in folders of documents. In a folder they are skipped, since an error for
# each would hide the real ones; if named themselves they are read, and rejected with a message.
# ruff: noqa: SIM905  (a list of quoted names would fill the screen)
_NOT_DOCUMENTS = frozenset(
    ".png .jpg .jpeg .gif .webp .bmp .ico .tif .tiff .heic .mp3 .wav .ogg .flac .m4a .mp4 .mkv .mov .avi .webm"
    " .woff .woff2 .ttf .otf .eot .pyc .pyo .so .o .a .class .exe .dll .dylib".split()
)


def find_files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Path | DocumentError]:
    """Find the files that paths mean, in a stable order, each once.

    A folder means all files below it, sorted by name; hidden ones (a name that begins with a dot) and images, sound,
    video, fonts and compiled code are skipped. Links are followed, loops end. A name that exists is taken as it
    is; else ``*``, ``?``, ``[`` and ``**`` make it a glob, and a folder that a glob matches means its files.

    Stores of this library, Git's own folder and virtual environments never hold documents: below a folder and in a
    glob's matches they are skipped, named themselves they are refused.

    Args:
        paths: Files, folders and globs; ``~`` is the home folder.

    Yields:
        Resolved absolute paths, and a DocumentError for each path that cannot be followed or means no file.
    """
    finder = _Finder()
    for pattern in paths:
        yield from finder.find(os.fspath(pattern))


def named_by(pattern: str | os.PathLike[str]) -> Callable[[str], bool]:
    """Returns whether a path is one that find_files would find by this pattern, if its file existed.

    The path itself, everything below it, or what a glob matches and everything below that.
    """
    text = os.path.expanduser(os.fspath(pattern))  # noqa: PTH111
    if not text or "\0" in text:
        return lambda path: False
    tops = tuple(dict.fromkeys((os.path.abspath(text), os.path.realpath(text))))  # noqa: PTH100
    if not os.path.lexists(text) and is_glob(text):
        shape = re.compile("|".join(glob_regex(top) for top in tops))
        return lambda path: shape.fullmatch(path) is not None
    below = tuple(os.path.join(top, "") for top in tops)  # noqa: PTH118
    return lambda path: path in tops or path.startswith(below)


def is_glob(text: str) -> bool:
    """Whether a text can be a glob."""
    return any(character in text for character in "*?[")


def glob_regex(glob: str) -> str:
    """A regular expression for the paths that a glob matches, and for all paths below them."""
    parts = glob.split(os.sep)  # noqa: PTH206 - not Path.parts: of an absolute glob that has the root as a part
    made = ""
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if part == "**":
            made += ".*" if last else "(?:[^/]+/)*"
            continue
        for piece in re.findall(r"\[!?\]?[^\]]*\]|.", part, re.DOTALL):
            if len(piece) > 1:
                negated, body = piece[1] == "!", piece[1:-1].removeprefix("!").replace("\\", "\\\\")
                made += f"[{'^' if negated else ''}{body}]"
            else:
                made += {"*": "[^/]*", "?": "[^/]"}.get(piece, re.escape(piece))
        made += "(?:/.*)?" if last else "/"
    return f"(?s:{made})"


class _Finder:
    """Finds files; remembers them over all paths of one call."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[tuple[int, int]] = set()
        self._kind = cache(folder_kind)

    def find(self, pattern: str) -> Iterator[Path | DocumentError]:
        if not pattern or "\0" in pattern:
            yield DocumentError(f"{pattern!r} is not a path.", remedy="Name a file, a folder or a glob.")
            return
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", pattern):
            yield DocumentError(
                f"{quoted(pattern)} is a URL, and URLs are not fetched.",
                remedy="Download it, for example with: curl -LO URL. Then ingest the file.",
            )
            return
        expanded = os.path.expanduser(pattern)  # noqa: PTH111  (Path("") would mean the current folder)
        if os.path.lexists(expanded):
            if part := self._part_of(expanded):
                yield DocumentError(f"{quoted(pattern)} is part of {part}, not a document.", remedy="Leave it out.")
            else:
                yield from self._below(expanded)
        elif is_glob(expanded):
            matches = [match for match in _glob(expanded) if not self._part_of(match)]
            if not matches:
                yield DocumentError(
                    f"The glob {pattern!r} matches nothing.", remedy="Check it, and quote it in a shell."
                )
            for match in matches:
                yield from self._below(match)
        else:
            yield DocumentError(
                f"{quoted(pattern)} does not exist.", remedy="Check the spelling and the current folder."
            )

    def _below(self, top: str) -> Iterator[Path | DocumentError]:
        """Yield the file itself, or all files of a folder."""
        pending = [top]
        anything = False
        while pending:
            path = pending.pop()
            try:
                status = os.stat(path)  # noqa: PTH116
                if stat.S_ISDIR(status.st_mode):
                    # Device and inode identify a folder under any path: a link to a parent ends here.
                    if (status.st_dev, status.st_ino) in self._folders:
                        anything = True
                        continue
                    self._folders.add((status.st_dev, status.st_ino))
                    pending += reversed([child for child in _listing(path) if not self._excluded(child)])
                    continue
                real = os.path.realpath(path, strict=True)
            except OSError as error:
                anything = True
                yield access_error(path, error)
                continue
            if os.path.islink(path) and self._part_of(real):  # noqa: PTH114
                continue
            anything = True
            refusal = special_error(path, status.st_mode)
            if refusal is not None:
                yield refusal
            elif real not in self._files:
                self._files.add(real)
                yield Path(real)
        if not anything:
            yield DocumentError(f"The folder {quoted(top)} holds no documents.", remedy="Name a folder with documents.")

    def _excluded(self, path: str) -> str:
        """What a path belongs to that is never a document, by itself and the folder that it is in; "" otherwise."""
        folder, name = os.path.split(path)
        if (kind := self._kind(path)) and kind != _ENVIRONMENT:
            return f"{kind} {quoted(path)}"
        if name in _OF_ENVIRONMENTS and self._kind(folder) == _ENVIRONMENT:
            return f"{_ENVIRONMENT} {quoted(folder)}"
        return ""

    def _part_of(self, path: str) -> str:
        """As `_excluded`, by all folders above the path too, links followed. A store's uploads are documents."""
        below, real = "", Path(os.path.realpath(path))
        for part in (real, *real.parents):
            uploaded = below == UPLOADS and self._kind(str(part)) == _STORE
            if not uploaded and (reason := self._excluded(str(part))):
                return reason
            below = part.name
        return ""


UPLOADS = "uploads"  # the demo keeps them in its store's folder
_STORE, _REPOSITORY, _ENVIRONMENT = "the store", "the Git repository", "the virtual environment"
# A virtual environment may have been made in a folder with documents: only its own parts are left out.
_OF_ENVIRONMENTS = frozenset({"bin", "include", "lib", "lib64", "share", "Scripts", "Lib", "Include", "pyvenv.cfg"})
_APPLICATION_ID = b"LMCR"  # in the header of a store's database


def folder_kind(folder: str) -> str:
    """Whether a folder is one of our stores, Git's own folder or a virtual environment, in words; "" otherwise."""

    def has(*names: str) -> bool:
        return any(os.path.lexists(os.path.join(folder, name)) for name in names)  # noqa: PTH118

    if has("store.db") and (has("lock", "index.faiss", "kv") or _is_database(os.path.join(folder, "store.db"))):  # noqa: PTH118
        return _STORE
    if has("HEAD") and has("objects") and has("refs"):  # bare ones too
        return _REPOSITORY
    return _ENVIRONMENT if has("pyvenv.cfg", "conda-meta") else ""


def _is_database(path: str) -> bool:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(72)[68:] == _APPLICATION_ID
    except OSError:
        return False


def _listing(folder: str) -> list[str]:
    """The entries of a folder, sorted by name, without hidden files and files that are not text."""
    kept = []
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        if name.startswith("."):
            continue
        if os.path.splitext(name)[1].lower() in _NOT_DOCUMENTS:  # noqa: PTH122
            logger.debug("skipped %s: not a kind of document", quoted(os.path.join(folder, name)))  # noqa: PTH118
            continue
        kept.append(os.path.join(folder, name))  # noqa: PTH118
    return kept


def _glob(pattern: str) -> list[str]:
    """Sorted matches. Path.glob is used because its ``**``, unlike glob.glob's, does not walk into links."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if is_glob(part))
    root = Path(*parts[:first])
    wants_hidden = any(part.startswith(".") for part in parts[first:])
    try:
        matches = sorted(root.glob(str(Path(*parts[first:]))))
    except (OSError, ValueError, NotImplementedError):
        return []
    return [
        str(match)
        for match in matches
        if wants_hidden or not any(part.startswith(".") for part in match.relative_to(root).parts)
    ]
