"""The commands that `serve` makes, without starting anything."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.serving.commands import ServeOptions, commands
from lmcache_rag.serving.machine import VLLMBuild


def make(*vllm: str, environment: dict[str, str] | None = None, build: VLLMBuild | None = None, **options: Any) -> Any:
    """The commands for these options, and by default for the usual build of vLLM."""
    return commands(ServeOptions("some/model", vllm, **options), environment or {}, build or VLLMBuild())


def value(command: tuple[str, ...], name: str) -> str:
    """The value of an option that is there once."""
    assert command.count(name) == 1
    return command[command.index(name) + 1]


def dry_run(*arguments: str) -> Any:
    """What `lmcache-rag serve` does with these arguments; the callers give --dry-run, or what is refused."""
    return CliRunner().invoke(app, ["serve", *arguments])
