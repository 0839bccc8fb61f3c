"""The model of a store: chosen at the first ingestion, recorded, and never another one by itself.

With it a store records the fingerprint of that model's KV, so that commands which only look or tidy up need not load a
tokenizer, let alone a model, to know which KV is current.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.engines.base import KV_FORMAT
from lmcache_rag.errors import StoreError
from lmcache_rag.prompt import PromptFormat

if TYPE_CHECKING:
    from lmcache_rag.engines.base import EngineInfo
    from lmcache_rag.settings import Settings
    from lmcache_rag.store import Registry, Store
    from lmcache_rag.weights import Source

_MODEL, _IDENTITY = "model", "identity"  # names of the store's facts
_SETTINGS = ("engine", "device", "dtype", "system", "instruction", "tenant")
_PACKAGES = ("lmcache-rag", "transformers", "tokenizers", "torch", "jinja2")


@dataclass(frozen=True, slots=True)
class StoreModel:
    """The model that a store was filled with.

    Attributes:
        name: Hugging Face name, or an absolute folder.
        origin: Kind of its source, see weights.Source.
        revision: The hub's commit; "" for others.
    """

    name: str
    origin: str
    revision: str = ""

    @classmethod
    def of(cls, source: Source) -> StoreModel:
        """The model of a source."""
        if source.origin == "folder":
            return cls(str(source.path), "folder")
        commit = source.path.name if source.origin == "hub" and source.path.parent.name == "snapshots" else ""
        return cls(source.name, source.origin, commit)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a store's KV is computed with.

    Attributes:
        fingerprint: Of the KV.
        model: Name of the model.
        can_blend: Whether it can be blended.
        why_not: The reason when it cannot.
    """

    fingerprint: str
    model: str
    can_blend: bool
    why_not: str


def recorded_model(registry: Registry) -> StoreModel | None:
    """The store's model, None before the first ingestion."""
    if not (text := registry.get_meta(_MODEL)):
        return None
    facts = json.loads(text)
    return StoreModel(facts["name"], facts["origin"], facts.get("revision", ""))


def find_store_model(registry: Registry | None) -> Source:
    """Find the store's model; for a new store choose one.

    Raises:
        SourceError: No source has it.
    """
    from lmcache_rag.weights import choose_model, find_model, find_recorded

    if registry is None:
        return choose_model()
    if known := recorded_model(registry):
        return find_recorded(known.name, known.origin, known.revision)
    # A store from before models were recorded was filled with the only default that there was.
    return find_model() if registry.doc_ids() else choose_model()


def record(store: Store, settings: Settings, source: Source, info: EngineInfo, fingerprint: str) -> None:
    """Record the model if the store has none, and the fingerprint of its KV. Nothing if another process is writing."""
    registry = store.registry
    facts: dict[str, str] = {}
    model = recorded_model(registry)
    if model is None and (settings.model is None or not registry.doc_ids()):
        model = StoreModel.of(source)
        facts[_MODEL] = json.dumps(asdict(model))
    files = _files(source.path)
    identity = asdict(Identity(fingerprint, info.model, info.can_blend, info.why_not))
    made = json.dumps({"of": _digest(settings, model), "path": str(source.path), "files": files, **identity})
    if registry.get_meta(_IDENTITY) != made:
        facts[_IDENTITY] = made
    if not facts or store.read_only:
        return
    with suppress(StoreError), store.writing(timeout=0):
        for key, value in facts.items():
            registry.set_meta(key, value)


def known_identity(registry: Registry, settings: Settings) -> Identity | None:
    """What the store's KV is computed with, if these settings are those of the last run and the model is unchanged."""
    try:
        facts = json.loads(registry.get_meta(_IDENTITY) or "{}")
        if facts.get("of") != _digest(settings, recorded_model(registry)):
            return None
        if facts["files"] != _files(Path(facts["path"])):
            return None
        return Identity(facts["fingerprint"], facts["model"], facts["can_blend"], facts["why_not"])
    except (OSError, ValueError, KeyError):
        return None


def is_store_model(name: str | None, model: StoreModel | None) -> bool:
    """Whether the setting `model` means the store's model."""
    return name is None or (model is not None and model.name in (name, os.path.realpath(name)))


def _digest(settings: Settings, model: StoreModel | None) -> str:
    """Digest of all that the fingerprint depends on besides the model's files."""
    facts: dict[str, Any] = {name: getattr(settings, name) for name in _SETTINGS}
    facts["model"] = "" if is_store_model(settings.model, model) else settings.model
    facts |= {"format": asdict(PromptFormat()), "kv": KV_FORMAT}
    facts["packages"] = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            facts["packages"][name] = importlib.metadata.version(name)
    # With a GPU the default dtype is another one.
    facts["gpus"] = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    facts["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _files(folder: Path) -> list[list[Any]]:
    """Name, size and time of change of each file of a model."""
    found = []
    for file in sorted(folder.iterdir()):
        status = file.stat()
        found.append([file.name, status.st_size, status.st_mtime_ns])
    return found
