"""Ctrl-C and SIGTERM: both end the work the same way, by an exception in the main thread."""

from __future__ import annotations

import shlex
import signal
import sys
from types import FrameType

_received: int | None = None


class Terminated(KeyboardInterrupt):
    """SIGTERM. Whatever cleans up after Ctrl-C cleans up after it too."""


def install() -> None:
    """Take both signals, except where whoever started us wants them ignored (as nohup does)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def received() -> int | None:
    """The signal that came and was not yet forgiven.

    Native code that a signal interrupts may raise some other exception; this tells what was behind it.
    """
    return _received


def forgive() -> None:
    """The interruption was meant for a part of the work only, which has stopped."""
    global _received
    _received = None


def ignore() -> None:
    """From here on the process only says goodbye: another Ctrl-C must not garble that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_IGN)


def command_line() -> str:
    """The command that runs, ready to be pasted into a shell."""
    return shlex.join(["lmcache-rag", *sys.argv[1:]])
