"""The page's web server: one page, a session for each browser, a password if one is needed."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import socket
import stat
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.credentials import LOOPBACK
from lmcache_rag.demo.session import Session
from lmcache_rag.errors import ConfigError, OptionalDependencyError

if TYPE_CHECKING:
    from lmcache_rag.demo.hub import Hub

log = logging.getLogger("lmcache_rag")

TITLE = "lmcache-rag demo"
_KEEP_S = 6 * 3600.0  # a session without an open page
_MOST_SESSIONS = 200
_WRONG_S = 1.0  # wait after a wrong password
_GRACE_S = 3
PASSWORD_VARIABLE = "LMCACHE_RAG_DEMO_PASSWORD"  # noqa: S105 - its name
LEAST_CHARACTERS = 12
_MOST_BYTES = 4096
_REMEDY = (
    f"Put one into the environment variable {PASSWORD_VARIABLE}, or into a file of your own that --password-file names."
)


def require_nicegui() -> None:
    """Check that the page's framework is installed.

    Raises:
        OptionalDependencyError: It is not installed.
    """
    # NiceGUI reads these when it is imported. Nothing of the page is kept on disk, and nothing in the current folder.
    os.environ.setdefault("NICEGUI_STORAGE_PATH", str(Path(tempfile.gettempdir()) / f"lmcache-rag-demo-{os.getuid()}"))
    try:
        import nicegui  # noqa: F401
    except ModuleNotFoundError as problem:
        raise OptionalDependencyError("nicegui", "demo") from problem


class Sessions:
    """The sessions by the id in each browser's signed cookie.

    Args:
        hub: Shared by the sessions.
        password: What a browser must give first; "" for none.
    """

    def __init__(self, hub: Hub, password: str) -> None:
        self._hub, self._password = hub, password
        self._sessions: dict[str, Session] = {}
        self._let_in: set[str] = set()
        self._gate: asyncio.Lock | None = None

    def get(self, cookie: str) -> Session:
        """The session of a browser, made at its first visit."""
        self._drop_old()
        if cookie not in self._sessions:
            # The cookie is a secret; the session's name goes to servers and into exports.
            self._sessions[cookie] = Session(secrets.token_hex(8), self._hub)
        session = self._sessions[cookie]
        session.seen = time.monotonic()
        return session

    def allowed(self, cookie: str) -> bool:
        """Whether a browser may see the page."""
        return not self._password or cookie in self._let_in

    async def let_in(self, cookie: str, password: str) -> bool:
        """Check a password; after a wrong one all attempts wait for a second."""
        if self._gate is None:
            self._gate = asyncio.Lock()
        async with self._gate:
            if matches(password, self._password):
                self._let_in.add(cookie)
                return True
            await asyncio.sleep(_WRONG_S)
            return False

    async def close(self) -> None:
        """Stop all sessions."""
        for session in self._sessions.values():
            await session.close()

    def _drop_old(self) -> None:
        now = time.monotonic()
        idle = [cookie for cookie, session in self._sessions.items() if not session.listeners and not session.busy]
        idle.sort(key=lambda cookie: self._sessions[cookie].seen)
        too_many = len(self._sessions) - _MOST_SESSIONS
        for number, cookie in enumerate(idle):
            if number < too_many or now - self._sessions[cookie].seen > _KEEP_S:
                gone = self._sessions.pop(cookie)
                task = asyncio.ensure_future(gone.close())
                task.add_done_callback(lambda done: done.exception())


def application(hub: Hub, *, host: str, password: str) -> Any:
    """The web application; imports NiceGUI.

    Args:
        hub: Shared by all sessions.
        host: Where it listens.
        password: What a browser must give first; "" for none.
    """
    require_nicegui()
    from fastapi import FastAPI
    from nicegui import app as pages
    from nicegui import ui
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    sessions = Sessions(hub, password)

    def root() -> None:
        from lmcache_rag.demo.page import Page

        cookie = str(pages.storage.browser["id"])
        if sessions.allowed(cookie):
            Page(sessions.get(cookie), hub)
        else:
            _login(lambda attempt: sessions.let_in(cookie, attempt))

    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(
        outer,
        root=root,
        title=TITLE,
        dark=None,
        language="en-US",
        tailwind=False,
        reconnect_timeout=30,
        storage_secret=secrets.token_hex(32),
        session_middleware_kwargs={"same_site": "strict", "session_cookie": "lmcache_rag_demo"},
        show_welcome_message=False,
    )
    pages.on_shutdown(sessions.close)
    pages.config.quasar_config["loadingBar"]["skipHijack"] = True  # a bar without an accessible name
    if is_loopback(host) and not password:
        # Against DNS rebinding: a foreign page's host name could resolve to this machine, and the page read ours.
        outer.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])
    return outer


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on that host and port.

    Raises:
        ConfigError: The port is in use, or the host is not an address of this machine.
    """
    sock: socket.socket | None = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as problem:
        if sock is not None:
            sock.close()
        raise ConfigError(
            f"The page cannot listen on {host}, port {port}: {problem.strerror or problem}.",
            remedy="Name another --port or --host; --port 0 takes a free one.",
        ) from None
    return sock


def serve(hub: Hub, sock: socket.socket, *, host: str, password: str, on_ready: Callable[[], None]) -> None:
    """Serve the page until a signal ends it, then close the hub.

    Args:
        hub: Shared by all sessions.
        sock: The listening socket.
        host: Where it listens.
        password: What a browser must give first; "" for none.
        on_ready: Called once the page can be opened.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_ready()

    app = application(hub, host=host, password=password)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S)
    hub.begin()
    try:
        Server(config).run(sockets=[sock])
    finally:
        sock.close()
        hub.close()


def open_browser(url: str) -> bool:
    """Open the page, if there is a screen."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    try:
        return webbrowser.open(url)
    except webbrowser.Error:
        return False


# -- the password: from the environment or a file, compared in constant time -------------------------------------------


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on that host."""
    return host in LOOPBACK or (host.startswith("127.") and host.replace(".", "").isdigit())


def page_password(host: str, file: Path | None) -> str:
    """The password that the page requires; "" if none.

    Args:
        host: Host on which the page listens. If other machines can reach it, a password is required.
        file: A file with the password; None: from the environment variable.

    Raises:
        ConfigError: A required password is missing or too short, or others can read the file.
    """
    password = _from_file(file) if file is not None else os.environ.get(PASSWORD_VARIABLE, "")
    if not password and not is_loopback(host):
        raise ConfigError(f"{host} can be reached from other machines, and there is no password.", remedy=_REMEDY)
    if password and len(password) < LEAST_CHARACTERS:
        raise ConfigError(
            f"The page's password is shorter than {LEAST_CHARACTERS} characters.",
            remedy="Make one with `openssl rand -hex 16`.",
        )
    return password


def matches(attempt: str, password: str) -> bool:
    """Whether they are equal, compared in constant time."""
    return hmac.compare_digest(attempt.encode(), password.encode())


def _from_file(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            text = stream.read(_MOST_BYTES + 1)
    except OSError as problem:
        raise ConfigError(
            f"The password file {file} cannot be read: {problem.strerror or problem}.",
            remedy="Name a file that this user can read.",
        ) from None
    if facts.st_mode & 0o077:
        raise ConfigError(
            f"The password file {file} can be read by others: its mode is {stat.S_IMODE(facts.st_mode):04o}.",
            remedy=f"Run `chmod 600 {file}`.",
        )
    try:
        password = text.decode().strip()
    except UnicodeDecodeError:
        password = ""
    if not password or len(text) > _MOST_BYTES or not password.isprintable():
        raise ConfigError(
            f"The password file {file} does not hold one line of text.", remedy="Write the password into it."
        )
    return password


def _login(let_in: Callable[[str], Any]) -> None:
    from nicegui import ui

    from lmcache_rag.demo.page_parts import CSS, PRIMARY, button, heading, label, put

    ui.add_css(CSS)
    ui.colors(primary=PRIMARY)
    ui.dark_mode(value=None)

    async def enter() -> None:
        if await let_in(str(field.value or "")):
            ui.navigate.reload()
        else:
            put(wrong, "That is not the password.")
            wrong.set_visibility(True)

    with (
        ui.element("div").classes("d-main").style("display: block; max-width: 26rem"),
        ui.element("div").classes("d-card"),
    ):
        heading(TITLE, 1)
        field = ui.input("Password", password=True).props(
            "outlined dense data-testid=password autocomplete=current-password"
        )
        field.on("keydown.enter", enter)
        wrong = label("", classes="d-error", test_id="login-error").props("role=alert")
        wrong.set_visibility(False)
        button("Log in", enter, test_id="login", main=True)
