"""What programs and users rely on, read off the package: exports, signatures, commands, settings, the wire.

    python tests/support/public_surface.py   # after a change that is meant; look at the difference before you commit it

`test_public_surface.py` compares it with tests/data/public_surface.json; with KEEP_SURFACE=1 it writes the keys of
`--json` documents there instead.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parents[1] / "data" / "public_surface.json"
FACES = ("lmcache_rag", "integrations.langchain", "integrations.llama_index", "lmcache_rag.engines.base")
PATHS = (  # in users' commands, compose files and configurations
    "lmcache_rag.connector.connector:CacheBlendConnector",
    "lmcache_rag.connector.plugin:register",
    "lmcache_rag.connector.server_guard:build_server_modules",
    "lmcache_rag.serving.lmcache_server:main",
)
OURS = ("lmcache_rag", "integrations")


def signature(function: Any) -> str:
    """Names, kinds and defaults of its parameters, without types: they are mypy's."""
    parameters = inspect.signature(function).parameters.values()
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in parameters]
    words = [one.replace(default=_default(one.default)) for one in bare]
    return str(inspect.Signature(words, __validate_parameters__=False))  # type: ignore[call-arg]


class _Word:
    def __init__(self, words: str) -> None:
        self._words = words

    def __repr__(self) -> str:
        return self._words


def _default(value: Any) -> Any:
    """A default whose text is the same in each run."""
    if value is inspect.Parameter.empty or isinstance(value, str | int | float | bool | None | tuple):
        return value
    if isinstance(value, enum.Enum):
        return _Word(str(value))
    if dataclasses.is_dataclass(value):
        return _Word(repr(value))
    return _Word(f"<{type(value).__name__}>")


def of_class(kind: type) -> dict[str, Any]:
    """Its constructor, its public methods and attributes, as far as they are ours."""
    members: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] not in OURS:
            continue
        for name, value in vars(base).items():
            if name.startswith(("_", "model_")):  # of pydantic's
                continue
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function):
                members[name] = signature(function)
            else:
                members[name] = "attribute"
        members |= {name: "attribute" for name in vars(base).get("__annotations__", {}) if not name.startswith("_")}
    found: dict[str, Any] = {"members": dict(sorted(members.items()))}
    home = _home(kind.__init__).partition(".")[0] in OURS or dataclasses.is_dataclass(kind)  # not a framework's
    if home and not getattr(kind, "_is_protocol", False) and not issubclass(kind, enum.Enum):
        found["call"] = signature(kind)
    return found


def exports(face: str) -> dict[str, Any]:
    """What a module offers."""
    module = importlib.import_module(face)
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if not name.startswith("_") and _home(value) == face
    ]
    found: dict[str, Any] = {}
    for name in sorted(names):
        value = getattr(module, name)
        found[name] = (
            of_class(value) if inspect.isclass(value) else signature(value) if callable(value) else repr(value)
        )
    return found


def _home(value: Any) -> str:
    return str(getattr(value, "__module__", ""))


def commands() -> dict[str, Any]:
    """Each command's arguments and options."""
    import typer

    from lmcache_rag.cli.app import app

    found: dict[str, Any] = {}

    def add(name: str, command: Any) -> None:
        rows = []
        for one in command.params:
            words = ["/".join([*one.opts, *one.secondary_opts]), str(one.metavar or "")]
            words += [word for word in ("required", "multiple", "hidden") if getattr(one, word, False)]
            rows.append(" ".join(words))
        found[name] = sorted(rows)
        for child, each in sorted(getattr(command, "commands", {}).items()):
            add(f"{name} {child}".strip(), each)

    add("", typer.main.get_command(app))
    return found


def settings() -> dict[str, str]:
    """Each setting's environment variable and default."""
    from lmcache_rag.settings import Settings

    prefix = Settings.model_config["env_prefix"]
    return {
        name: f"{prefix}{name.upper()} {each.get_default(call_default_factory=True)!r}"
        for name, each in Settings.model_fields.items()
    }


def keys(value: Any) -> Any:
    """The keys of a JSON document; of a list those of all its elements."""
    if isinstance(value, dict):
        return {name: keys(each) for name, each in sorted(value.items())}
    if isinstance(value, list):
        shapes: list[Any] = []
        for each in map(keys, value):
            if each is not None and each not in shapes:
                shapes.append(each)
        return sorted(shapes, key=json.dumps) or []
    return None


def surface() -> dict[str, Any]:
    """All of it."""
    return {
        "exports": {face: exports(face) for face in FACES},
        "commands": commands(),
        "settings": settings(),
    }


def kept() -> dict[str, Any]:
    """What was kept."""
    found: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    return found


def keep(found: dict[str, Any]) -> None:
    """Put it beside what was kept, or in its place."""
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(kept() | found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    keep(surface())
