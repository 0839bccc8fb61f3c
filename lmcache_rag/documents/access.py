"""Errors for paths that cannot be read."""

from __future__ import annotations

import errno
import os
import stat

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
