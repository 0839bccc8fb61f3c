"""The Hugging Face cache and hub: only files that hold data are taken, no pickle and no code."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from urllib.parse import quote

from lmcache_rag.weights.base import Kind, UnavailableError, what_is_missing

log = logging.getLogger("lmcache_rag")

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.tiktoken", "tokenizer.model", "spiece.model"]
DUPLICATES = ["consolidated*", "original/*", "onnx/*", "openvino/*"]  # the same weights in another form
PROBE_SECONDS = 3.0


def cached(name: str, kind: Kind, *, revision: str | None) -> Path:
    """The snapshot in the Hugging Face cache, without network.

    Raises:
        UnavailableError: There is none, or a download of it was cut off.
    """
    from huggingface_hub import constants

    path = _snapshot(name, revision=revision, local_files_only=True)
    if path is None:
        raise UnavailableError(f"not in {constants.HF_HUB_CACHE}")
    missing = what_is_missing(path, kind)
    if missing:
        raise UnavailableError(f"{path} is not whole: {missing}")
    return path


def download(name: str, kind: Kind, *, revision: str | None) -> Path:
    """Fetch a snapshot into the Hugging Face cache.

    Raises:
        UnavailableError: The hub is switched off, cannot be reached, or has no such model as safetensors.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise UnavailableError("switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE")
    if reason := silence(constants.ENDPOINT, f"{quote(name)}/resolve/{revision or 'main'}/config.json"):
        raise UnavailableError(reason)
    log.info("Getting %s from %s.", name, constants.ENDPOINT)
    path = _snapshot(name, revision=revision, local_files_only=False)
    assert path is not None  # noqa: S101 (only local look-ups give None)
    missing = what_is_missing(path, kind)
    if missing:
        raise UnavailableError(f"{name} cannot be used: {missing}")
    return path


def silence(endpoint: str, page: str, *, seconds: float = PROBE_SECONDS) -> str:
    """Why a server gives no sign of life within so many seconds; "" if it does. Proxies are respected."""
    answer: list[str] = []
    # A look-up of the host's name has no time limit of its own, so the whole probe runs beside us.
    probe = threading.Thread(target=lambda: answer.append(_probe(endpoint, page, seconds)), daemon=True)
    probe.start()
    probe.join(seconds)
    return answer[0] if answer else f"{endpoint} did not answer within {seconds:g} s"


def _probe(endpoint: str, page: str, seconds: float) -> str:
    import httpx

    try:
        status = httpx.head(f"{endpoint}/{page}", timeout=seconds).status_code
    except Exception as problem:  # proxies, certificates, odd addresses: whatever it is, this thread must report it
        return f"{endpoint} cannot be reached ({problem or type(problem).__name__})"
    return f"{endpoint} answered with error {status}" if status >= 500 else ""


def _snapshot(name: str, *, revision: str | None, local_files_only: bool) -> Path | None:
    """The snapshot folder; None if a local look-up finds nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=PATTERNS,
            ignore_patterns=DUPLICATES,
        )
    except LocalEntryNotFoundError as problem:
        if local_files_only:
            return None
        raise UnavailableError(_first_line(problem)) from problem
    except Exception as problem:  # its errors come from several HTTP clients, by version; none may end the search
        raise UnavailableError(_first_line(problem)) from problem
    return Path(path)


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0].strip() if lines else type(problem).__name__
