"""All errors of this library. Each has a message (what happened) and a remedy (what to do about it).

::

    LMCacheRAGError
    ├── ConfigError                a setting or argument is not valid
    ├── PromptError                a prompt cannot be built from this template or text
    │   └── ContextLengthError     the prompt is longer than the model's context
    ├── DocumentError              one document cannot be read (the others are ingested)
    ├── SourceError                no source has the model or the embedder
    ├── StoreError                 the store on disk
    │   ├── StoreLockedError       another process is writing to it
    │   ├── StoreVersionError      written by a newer version of this library
    │   ├── StoreCorruptError      damaged
    │   ├── StoreReadOnlyError     cannot be written
    │   └── StoreFullError         no space left on the device
    ├── EngineError                the inference engine
    │   ├── UnsupportedModelError  this model cannot be blended
    │   ├── PinRefusedError        a chunk cannot be pinned: there is no room for more
    │   ├── PrecomputeError        a chunk's KV could not be computed or stored
    │   └── EngineUnavailableError the engine cannot be reached
    └── OptionalDependencyError    an extra is not installed (also an ImportError)
"""

from __future__ import annotations


class LMCacheRAGError(Exception):
    """Base class.

    Args:
        message: What happened, in one sentence.
        remedy: What the user can do about it; shown after the message.
    """

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class ConfigError(LMCacheRAGError, ValueError):
    """A setting or argument is not valid."""


class PromptError(LMCacheRAGError, ValueError):
    """A prompt cannot be built from this template or text."""


class ContextLengthError(PromptError):
    """The prompt is longer than the model's context."""


class DocumentError(LMCacheRAGError):
    """One document cannot be read; the others are ingested."""


class SourceError(LMCacheRAGError):
    """No source has the model or the embedder."""


class StoreError(LMCacheRAGError):
    """Something about the store on disk."""


class StoreLockedError(StoreError):
    """Another process is writing to the store."""


class StoreVersionError(StoreError):
    """The store was written by a newer version of this library."""


class StoreCorruptError(StoreError):
    """A file of the store is damaged."""


class StoreReadOnlyError(StoreError):
    """The store cannot be written."""


class StoreFullError(StoreError):
    """No space is left on the device."""


class EngineError(LMCacheRAGError):
    """Something about the inference engine."""


class UnsupportedModelError(EngineError):
    """The model cannot be blended."""


class PrecomputeError(EngineError):
    """A chunk's KV could not be computed or stored; nothing was recorded."""


class PinRefusedError(EngineError):
    """A chunk cannot be pinned: there is no room for more, or the server cannot do it."""


class EngineUnavailableError(EngineError):
    """The engine cannot be reached."""


class OptionalDependencyError(LMCacheRAGError, ImportError):
    """An optional package is missing.

    Args:
        package: Its name, or that of the module that could not be imported.
        extra: The extra of this package that installs it.

    Attributes:
        package: As given.
        extra: As given.
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        name = _DISTRIBUTIONS.get(package, package)
        clone = "in a clone of lmcache-rag, which is not on PyPI yet"
        super().__init__(f"{name} is not installed.", remedy=f'Install it with: pip install ".[{extra}]" ({clone})')


# Packages whose modules have another name.
_DISTRIBUTIONS = {"bs4": "beautifulsoup4", "docx": "python-docx", "faiss": "faiss-cpu", "pptx": "python-pptx"}
