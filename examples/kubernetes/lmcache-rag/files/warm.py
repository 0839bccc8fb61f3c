"""Brings the chunks of a store into this pod's LMCache; the readiness probe looks for /run/warm/ready.

Waits for vLLM, and runs `lmcache-rag warm`. Later it watches how many chunks LMCache can blend, and warms again when
they are gone, as after a restart of LMCache. After WARM_SECONDS, or if there is no store yet, the pod becomes ready
without.
"""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import httpx

VLLM = os.environ.get("WARM_VLLM", "http://127.0.0.1:8000")
LMCACHE = os.environ.get("WARM_LMCACHE", "http://127.0.0.1:8089")
STORE = Path(os.environ["WARM_STORE"])
READY = Path(os.environ.get("WARM_READY", "/run/warm/ready"))
SECONDS = float(os.environ.get("WARM_SECONDS", "3600"))
EVERY = float(os.environ.get("WARM_EVERY", "15"))
COPY = READY.parent / "store"


def get(url):
    """The text of a page; "" if there is none."""
    key = os.environ.get("LMCACHE_HTTP_API_KEY") if url.startswith(LMCACHE) else ""
    try:
        page = httpx.get(url, timeout=10, trust_env=False, headers={"Authorization": f"Bearer {key}"} if key else {})
    except (httpx.HTTPError, httpx.InvalidURL):
        return ""
    return (page.text or " ") if page.status_code == 200 else ""


def entries():
    """How many of its chunks LMCache can blend; None if it does not say."""
    found = re.search(r"^lmcache_rag_index_entries(?:\{[^}]*\})? (\S+)$", get(f"{LMCACHE}/metrics"), re.MULTILINE)
    return float(found[1]) if found else None


def copy_store():
    """Copy the store, which others may be writing to and this container cannot."""
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(STORE, COPY, ignore=shutil.ignore_patterns("store.db*", "kv", "lock"))
    for mode in ("mode=ro", "mode=ro&immutable=1"):  # the second where no file can be made beside it
        try:
            with (
                closing(sqlite3.connect(f"file:{STORE}/store.db?{mode}", uri=True)) as source,
                closing(sqlite3.connect(COPY / "store.db")) as target,
            ):
                source.backup(target)
            return
        except sqlite3.OperationalError as problem:
            print(f"warm: {STORE}/store.db: {problem}", flush=True)
    raise OSError("the store cannot be read")


def warm(until):
    """Whether LMCache has the store's chunks now. The pod is ready at that time all the same."""
    if not (STORE / "store.db").exists():
        print(f"warm: there is no store in {STORE} yet", flush=True)
        return True
    try:
        copy_store()
    except (OSError, sqlite3.Error, shutil.Error) as problem:
        print(f"warm: {problem}", flush=True)
        return False
    command = [sys.executable, "-m", "lmcache_rag", "warm", "--store", str(COPY), "--engine", VLLM]
    running = subprocess.Popen(command)
    while running.poll() is None:
        if time.monotonic() > until:
            READY.touch()
        time.sleep(min(EVERY, 1))
    return running.returncode == 0


def main():
    """Warm once, then as often as it is needed."""
    until, warmed, most = None, False, 0.0
    READY.unlink(missing_ok=True)  # this container has been restarted: what LMCache has is not known
    while True:
        if get(f"{VLLM}/health"):
            until = until or time.monotonic() + SECONDS
            now = entries()
            if not warmed or (now is not None and now < most / 2):
                warmed, most = warm(until), 0.0
                now = entries()
            most = max(most, now or 0.0)
            if warmed or time.monotonic() > until:
                READY.touch()
        time.sleep(EVERY)


if __name__ == "__main__":
    main()
