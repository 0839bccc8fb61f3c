"""How the servers of the tests answer: JSON, errors as OpenAI's API gives them, and server-sent events."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import Any


class ApiHandler(BaseHTTPRequestHandler):
    """A connection is closed after each answer, so that clients that nobody closes leave no open socket behind."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def send_event(self, document: dict[str, Any]) -> None:
        """A piece of a stream; a client that has left is noted as the server's `gone`."""
        try:
            self.wfile.write(f"data: {json.dumps(document)}\n\n".encode())
            self.wfile.flush()
        except OSError:
            self.server.gone.set()
            raise

    def send_problem(self, status: int, message: str) -> None:
        self.send_document(status, {"error": {"message": message, "type": "Error", "param": None, "code": status}})

    def send_document(self, status: int, document: Any) -> None:
        self.send_text(status, json.dumps(document), "application/json")

    def send_text(self, status: int, text: str, kind: str) -> None:
        data = text.encode()
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
