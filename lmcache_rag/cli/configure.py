"""settings: every setting, its value now and where that comes from."""

from __future__ import annotations

import os
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.text import Text

from lmcache_rag.cli import options
from lmcache_rag.cli.render import plain
from lmcache_rag.cli.run import Run
from lmcache_rag.cli.verb import verb
from lmcache_rag.settings import FILE, Settings


@verb(*options.PLACE, *options.EMBED, *options.SPLIT, *options.ANSWER)
def settings(run: Run) -> None:
    """List every setting: its value, where that comes from, what it does.

    An option goes before the environment, that before settings.toml in the
    store, that before the default. A change of a setting marked with * makes
    new KV; the old is kept, and never used for it.

    [bold]Examples[/bold]
      lmcache-rag settings
      echo 'top_k = 6' >> lmcache-rag-store/settings.toml
      LMCACHE_RAG_RATIO=0.3 lmcache-rag settings --json
    """
    values = run.settings()
    file = Path(values.store) / FILE
    rows = [_row(name, getattr(values, name), _origin(name, run.given, file)) for name in Settings.model_fields]
    if run.json:
        run.emit({"file": str(file), "settings": rows})
        return
    for row in rows:
        value = "not set" if row["value"] in (None, "") else str(row["value"])
        line = Text(f"{row['name']}{' *' if row['makes_new_kv'] else ''} = ", style="bold")
        line.append(value, style="not bold" if row["source"] == "default" else "not bold green")
        line.append(f"  ({row['source']}; {row['variable']})", style="not bold dim")
        run.out.print(line, soft_wrap=True)
        run.out.print(f"    {row['description']}", style="dim", soft_wrap=True)
    run.out.print(f"\n* A change makes new KV.\nSettings of this store: {file}", soft_wrap=True)
    known = {options.variable(name) for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.upper() not in known and (meant := get_close_matches(name.upper(), known, n=1, cutoff=0.9)):
            run.tell(f"The environment variable {name} does nothing: {meant[0]} may be meant.", style="yellow")


def _row(name: str, value: Any, source: str) -> dict[str, Any]:
    return {
        "name": name,
        "variable": options.variable(name),
        "value": plain(value),
        "source": source,
        "makes_new_kv": options.makes_new_kv(name),
        "description": options.described(name),
    }


def _origin(name: str, given: dict[str, Any], file: Path) -> str:
    """Which of the sources a value comes from, in the order in which Settings asks them."""
    if given.get(name) is not None:
        return "argument"
    if any(known.upper() == options.variable(name) and value for known, value in os.environ.items()):
        return "environment"
    if file.exists() and name in tomllib.loads(file.read_text(encoding="utf-8")):
        return FILE
    return "default"
