"""Second tiers for KV: the values of --l2, and how passwords reach LMCache without appearing on a command line.

A text in LMCache's JSON may hold ``${NAME}``, a variable of the environment, or ``${file:PATH}``, the text in a file.
They appear unfilled on the command line, in `--dry-run` and in logs; lmcache_rag.serving.lmcache_server fills them in
inside LMCache's own process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lmcache_rag.connector.lmcache_server.settings import SERDE
from lmcache_rag.errors import ConfigError

OPTION = "--l2-adapter"
CHECKED = ("fs", "fs_native", "resp", "valkey", "s3")  # adapters that take objects of any size
TIMEOUT_S = 2.0  # of a request to Valkey or Redis: a look-up waits for two of them where it does not answer
_PLACEHOLDER = re.compile(r"\$\{(file:)?([^{}]+)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(
    r"(?:^|_)(?:pass|passwd|password|passphrase|secret|token|credentials?|auth|sas)$"
    r"|(?:api|access|private|secret|account)_?key(?:_id)?$|connection_string$",
    re.IGNORECASE,
)
_FORMS = 'Give a folder, redis://host:port, or LMCache\'s JSON with a "type" (see lmcache server --help).'
_HIDE = "Put it into a variable or a file, and give ${NAME} or ${file:PATH} in its place."


def second_tier(text: str) -> str:
    """LMCache's JSON for a second tier: from a folder, redis://host:port, or that JSON itself. Placeholders stay.

    Raises:
        ConfigError: It is none of them, or contains a password. The message does not repeat the text.
    """
    if text.lstrip().startswith("{"):
        try:
            tier = json.loads(text)
        except ValueError as problem:
            where = (
                f"{problem.msg}, character {problem.pos}" if isinstance(problem, json.JSONDecodeError) else "invalid"
            )
            raise ConfigError(f"--l2 is not valid JSON: {where}.", remedy=_FORMS) from None
        if not isinstance(tier.get("type"), str):
            raise ConfigError('--l2 has no "type".', remedy=_FORMS)
    else:
        tier = _short(text)
    if found := next(_plain_secrets(tier), ""):
        raise ConfigError(f"--l2: {found} is on the command line, where `ps` shows it to all users.", remedy=_HIDE)
    for name, is_file in placeholders(json.dumps(tier)):
        if not is_file and not _NAME.fullmatch(name):
            raise ConfigError(f"--l2: ${{{name}}} names no variable.", remedy=_HIDE)
    return json.dumps(tier)


def checked_tier(tier: str, secret_file: Path | None) -> str:
    """LMCache's JSON of a second tier whose bytes are checked, unless it names a serde itself.

    Args:
        tier: As from `second_tier`.
        secret_file: File of the key that they are checked by; None: a known key.
    """
    settings: dict[str, Any] = json.loads(tier)
    if settings["type"] in CHECKED and "serde" not in settings and not settings.get("use_odirect"):
        settings["serde"] = {"type": SERDE} | ({"secret_file": str(secret_file)} if secret_file else {})
    return json.dumps(settings)


def _short(text: str) -> dict[str, Any]:
    """The JSON of a folder, or of redis://[user][:${NAME}@]host:port."""
    scheme, found, rest = text.partition("://")
    if not found:
        if not text.strip():
            raise ConfigError("--l2 is empty.", remedy=_FORMS)
        return {"type": "fs", "base_path": text}
    account, _, place = rest.rstrip("/").rpartition("@")
    host, _, port = place.rpartition(":")
    if scheme not in ("redis", "valkey") or not host or not port.isdigit():
        raise ConfigError(f"--l2 {scheme}://... is not known.", remedy=_FORMS)
    user, _, password = account.partition(":")
    named = {"username": user, "password": password}
    # LMCache's adapter for Redis, "resp", never connects again; this one has Valkey's own client, for both.
    adapter: dict[str, Any] = {
        "type": "valkey",
        "startup_nodes": f"{host.strip('[]')}:{port}",
        "request_timeout": TIMEOUT_S,
    }
    return adapter | {name: text for name, text in named.items() if text}


def _plain_secrets(value: Any, name: str = "") -> Iterator[str]:
    """Names of passwords and keys that are in plain text."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _plain_secrets(one, str(key))
    elif isinstance(value, list):
        for one in value:
            yield from _plain_secrets(one, name)
    elif isinstance(value, str) and value:
        rest = _PLACEHOLDER.sub("", value)
        if rest and _SECRET.search(name):
            yield f'"{name}"'
        elif "://" in rest and _password(rest):
            yield f'a password in "{name}"'


def _password(url: str) -> bool:
    try:
        return bool(urlsplit(url).password)
    except ValueError:
        return "@" in url


def placeholders(text: str) -> list[tuple[str, bool]]:
    """The placeholders in a text: (name, whether it is a file)."""
    return [(name, bool(is_file)) for is_file, name in _PLACEHOLDER.findall(text)]


def filled(text: str, environment: Mapping[str, str]) -> str:
    """LMCache's JSON with its placeholders filled in.

    Raises:
        ConfigError: A variable is not set, or a file cannot be read.
    """
    return json.dumps(_filled(json.loads(text), lambda found: _value(found, environment)))


def _filled(value: Any, fill: Callable[[re.Match[str]], str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(one, fill) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, fill) for one in value]
    return _PLACEHOLDER.sub(fill, value) if isinstance(value, str) else value


def _value(found: re.Match[str], environment: Mapping[str, str]) -> str:
    is_file, name = found.groups()
    if not is_file:
        if not environment.get(name):
            raise ConfigError(f"--l2: the variable {name} is not set.", remedy="Set it before `lmcache-rag serve`.")
        return environment[name]
    try:
        return Path(name).expanduser().read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or "it is not text"
        raise ConfigError(f"--l2: {name} cannot be read: {reason}.", remedy="Is the path right?") from None


def variables(tiers: Sequence[str]) -> set[str]:
    """The variables that second tiers take their passwords from."""
    return {name for tier in tiers for name, is_file in placeholders(tier) if not is_file}
