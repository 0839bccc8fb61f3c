"""A Hugging Face hub and its troubles on this machine: servers that answer, say nothing, or never finish."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"

HANGS = 180.0  # seconds: longer than any test waits

Answer = Callable[[BaseHTTPRequestHandler], None]


class LocalServer(ThreadingHTTPServer):
    """Listens on loopback and notes what was asked for."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answer: Answer) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                asked.append(f"{self.command} {self.path}")
                answer(self)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(answer: Answer) -> Iterator[LocalServer]:
    server = LocalServer(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def say_nothing(_: BaseHTTPRequestHandler) -> None:
    """Accept the request and never answer."""
    time.sleep(HANGS)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """Send a header now and then, so that no single read ever times out."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(int(2 * HANGS)):
        handler.wfile.write(f"x-{number}: .\r\n".encode())
        handler.wfile.flush()
        time.sleep(0.5)


def fail(handler: BaseHTTPRequestHandler) -> None:
    """Answer like a gateway that reaches nobody."""
    send(handler, 502, b"bad gateway")


def hub_of(name: str, files: dict[str, bytes]) -> Answer:
    """A hub with one repository."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.split("?")[0]
        if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
            siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
            send_json(handler, {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        elif path == f"/api/models/{name}/tree/{COMMIT}":
            send_json(handler, [entry(file, content) for file, content in files.items()])
        elif path.startswith(f"/{name}/resolve/") and (file := path.split("/", 5)[5]) in files:
            content = files[file]
            send(handler, 200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{blob_id(content)}"'})
        else:
            send_json(handler, {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    return answer


def entry(file: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": file, "size": len(content), "oid": blob_id(content)}


def blob_id(content: bytes) -> str:
    """Git's name for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def send_json(
    handler: BaseHTTPRequestHandler, value: object, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    send(handler, status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def lay_out_snapshot(cache: Path, name: str, files: dict[str, bytes]) -> Path:
    """A Hugging Face cache as a download leaves it: blobs, links to them in a snapshot, and a ref."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for file, content in files.items():
        link, blob = snapshot / file, repository / "blobs" / blob_id(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    return snapshot
