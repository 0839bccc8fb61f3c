"""How the status of a store looks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from lmcache_rag.cli.render import count, duration, facts, place, show, size

if TYPE_CHECKING:
    from rich.console import Console

    from lmcache_rag.kv_manager import Status
    from lmcache_rag.store import FingerprintStats


def show_status(out: Console, path: Path, status: Status, *, read_only: bool) -> None:
    """Write the status of a store, and what to do about it."""
    store = status.store
    current = next((part for part in store.kv if part.fingerprint == status.fingerprint), None)
    stale = [part for part in store.kv if part.stale]
    embedder = f"{store.embedder}, {store.dimension} dimensions" if store.embedder else "none yet"
    rows = [
        ("Store", place(str(path)) + (" (read-only)" if read_only else "")),
        ("Documents", f"{store.documents:,}"),
        ("Chunks", f"{store.chunks:,} ({count(store.tokens, 'token')})"),
        ("Database", size(store.database_bytes)),
        ("Embedder", embedder),
        ("Model", status.model + ("" if status.can_blend else f"; cannot be blended: {status.why_not}")),
        ("Fingerprint", f"{status.fingerprint[:16]}…"),
        ("KV", f"{count(current.keys if current else 0, 'chunk')}, {size(current.nbytes if current else 0)}"),
    ]
    if servers := status.usage.details.get("servers"):
        rows.append(("Servers", ", ".join(servers)))  # what they hold, no API tells
    else:
        rows.append(("KV files", f"{status.usage.chunks:,}, {size(status.usage.disk_bytes)}"))
    rows += [("Stale KV", _one(part)) for part in stale]
    if store.trash:
        rows.append(("To drop", count(store.trash, "chunk")))
    show(out, facts(rows))
    if store.chunks_without_kv:
        out.print(
            f"{count(store.chunks_without_kv, 'chunk')} without KV. To compute it: lmcache-rag warm", style="yellow"
        )
    if stale:
        out.print(f"{size(store.stale_bytes)} of KV are stale. To drop them: lmcache-rag prune", style="yellow")
    if store.chunks_without_embedding:
        out.print(
            f"{count(store.chunks_without_embedding, 'chunk')} without embedding: no search finds them.", style="red"
        )


def _one(part: FingerprintStats) -> str:
    model, dtype = part.facts.get("model", "unknown"), part.facts.get("dtype", "")
    age = duration(max(time.time() - part.created_at, 0))
    return f"{part.fingerprint[:16]}… {model} {dtype}: {count(part.keys, 'chunk')}, {size(part.nbytes)}, {age} old"
