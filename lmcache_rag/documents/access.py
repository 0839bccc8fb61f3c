"""Errors for paths that cannot be read."""

from __future__ import annotations

import errno
import os
import stat
import sys

from lmcache_rag.errors import DocumentError

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def quoted(path: str | os.PathLike[str]) -> str:
    r"""The path for a message: on one line whatever it holds (a newline shows as \n, emoji as they are)."""
    return repr(os.fspath(path))


def access_error(path: str | os.PathLike[str], error: OSError) -> DocumentError:
    """The DocumentError for an error of the operating system about a path."""
    name = quoted(path)
    match error.errno:
        case errno.ELOOP:
            return DocumentError(
                f"{name} is a symbolic link that leads back to itself.", remedy="Remove the link or point it at a file."
            )
        case errno.ENOENT if os.path.islink(path):  # noqa: PTH114  (a name may be no valid Path)
            return DocumentError(
                f"{name} is a symbolic link to nothing.", remedy="Remove the link or restore its file."
            )
        case errno.ENOENT | errno.ENOTDIR:
            return DocumentError(f"{name} does not exist.", remedy="Check the spelling and the current folder.")
        case errno.EACCES | errno.EPERM:
            return DocumentError(
                f"{name} may not be read: permission denied.", remedy="Give this user read permission, or leave it out."
            )
        case _:
            return DocumentError(
                f"{name} cannot be read: {error.strerror or error}.",
                remedy="Check the file and the disk that it is on.",
            )


def name_error(path: str | os.PathLike[str]) -> DocumentError:
    """The DocumentError for a name that cannot be stored, since it is not valid Unicode here."""
    try:
        name = os.fsencode(path).decode()
    except UnicodeDecodeError:
        return DocumentError(f"{quoted(path)} has a name that is not valid Unicode.", remedy="Rename it.")
    return DocumentError(
        f"{name!r} has a name in UTF-8, and the locale of this process has the encoding "
        f"{sys.getfilesystemencoding().upper()}.",
        remedy="Set a locale with UTF-8, for example LC_ALL=C.UTF-8, or PYTHONUTF8=1.",
    )


def is_gone(path: str) -> bool:
    """Whether there is certainly no such file; not for one that cannot be looked at now (no permission, a bad disk)."""
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def special_error(path: str | os.PathLike[str], mode: int) -> DocumentError | None:
    """The DocumentError for anything that is not a regular file; None for a regular file.

    Args:
        path: Named in the message.
        mode: ``st_mode`` of the path.
    """
    if stat.S_ISREG(mode):
        return None
    kind = _SPECIAL.get(stat.S_IFMT(mode), "no regular file")
    return DocumentError(f"{quoted(path)} is {kind}, not a document.", remedy="Name regular files, or leave it out.")
