"""The common options, made from Settings so that names, types, defaults and help agree with them.

An option that is not given stays None: Settings.load then asks the environment, the store's file and the default.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from rich.markup import escape

from lmcache_rag.settings import Settings

PREFIX = str(Settings.model_config["env_prefix"])

PLACE = ("store", "engine", "model", "device", "dtype", "kv_budget_gb")
EMBED = ("embedder",)
SPLIT = ("chunk_tokens", "chunk_overlap")
ANSWER = ("policy", "ratio", "blend", "top_k", "max_tokens", "temperature")


@dataclass(frozen=True)
class _Look:
    """What differs from the field's own name and default."""

    flag: str = ""
    metavar: str | None = None
    default: str = ""
    several: bool = False


_LOOKS = {
    "store": _Look(metavar="DIR"),
    "engine": _Look(metavar="URL", several=True),
    "model": _Look(metavar="NAME", default="a small one"),
    "embedder": _Look(metavar="NAME", default="a small one"),
    "device": _Look(metavar="NAME"),
    "dtype": _Look(metavar="NAME", default="float32, on a GPU bfloat16"),
    "kv_budget_gb": _Look("--kv-budget", metavar="GB"),
    "policy": _Look(metavar="NAME"),
    "ratio": _Look(metavar="0..1"),
    "blend": _Look("--blend/--no-blend", default="blend"),
    "top_k": _Look(metavar="N"),
    "max_tokens": _Look(metavar="N"),
    "temperature": _Look(metavar="T"),
    "chunk_tokens": _Look(metavar="N"),
    "chunk_overlap": _Look(metavar="N"),
}


def variable(field: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{field}".upper()


def makes_new_kv(field: str) -> bool:
    """Whether a change of this setting makes new KV."""
    return (Settings.model_fields[field].description or "").endswith("(KV)")


def described(field: str) -> str:
    """What a setting does, in a sentence."""
    return (Settings.model_fields[field].description or "").removesuffix("(KV)").strip()


def parameter(field: str) -> inspect.Parameter:
    """A setting as a parameter that typer makes an option of."""
    look = _LOOKS[field]
    facts = Settings.model_fields[field]
    note = f"[env: {variable(field)}]"
    if default := look.default or ("" if facts.default is None else str(facts.default)):
        note = f"{note[:-1]}; default: {default}]"
    option = typer.Option(
        look.flag or f"--{field.replace('_', '-')}",
        metavar=look.metavar,
        help=f"{escape(described(field))} [dim]{escape(note)}[/dim]",
        show_default=False,
    )
    kind = list[str] if look.several else _plain(facts.annotation)
    return _parameter(field, Annotated[kind | None, option], None)


def json_parameter() -> inspect.Parameter:
    """--json."""
    option = typer.Option("--json", help="Machine output: one JSON document on stdout.", show_default=False)
    return _parameter("json", Annotated[bool, option], False)


def verbose_parameter() -> inspect.Parameter:
    """--verbose."""
    option = typer.Option("--verbose", "-v", help="Say more on stderr; errors come with a traceback.")
    return _parameter("verbose", Annotated[bool, option], False)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _plain(annotation: Any) -> Any:
    """The type without None; a path is text here, since typer would otherwise show its own name for it."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return str if annotation is Path else annotation
