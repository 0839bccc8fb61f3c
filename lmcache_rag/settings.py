"""Settings: by argument, then LMCACHE_RAG_* environment, then the store's settings.toml, then the default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from lmcache_rag.budget import AUTO, parse_budget, parse_budget_text
from lmcache_rag.errors import ConfigError
from lmcache_rag.passage_order import OrderMode

FILE = "settings.toml"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(age: str | float) -> float:
    """An age in seconds: a number of them, or a text such as 30d, 12h, 90m or 45s.

    Raises:
        ConfigError: It is none, or not above 0.
    """
    if isinstance(age, str):
        number, unit = (age[:-1], age[-1:]) if age[-1:] in _UNITS else (age, "s")
        value = float(number) * _UNITS[unit] if re.fullmatch(r"\d+(\.\d+)?", number) else 0.0
    else:
        value = float(age) if isinstance(age, int | float) and not isinstance(age, bool) else 0.0
    if not value > 0:
        raise ConfigError(f"{age!r} is not an age.", remedy="Write for example 30d, 12h or 90m.")
    return value


class Settings(BaseSettings):
    """All settings. A change to a field marked (KV) needs new KV: existing KV is not reused for it."""

    model_config = SettingsConfigDict(env_prefix="LMCACHE_RAG_", env_ignore_empty=True, extra="forbid", frozen=True)

    store: Path = Field(Path("lmcache-rag-store"), description="Folder of the store.")
    engine: str = Field("embedded", description="embedded, or URLs of vLLM servers, with commas between them. (KV)")
    engine_timeout_s: float = Field(120.0, gt=0, description="How long a vLLM server may send nothing.")
    model: str | None = Field(None, description="Folder or Hugging Face name of the model. (KV)")
    embedder: str | None = Field(None, description="Folder or Hugging Face name of the embedding model.")
    device: str | None = Field(None, description='"cpu", "cuda", "cuda:1" …; default: a GPU if there is one.')
    dtype: str | None = Field(None, description="float32, bfloat16 or float16. (KV)")
    policy: str = Field("query", description="Recompute policy: query, hkvd, head, none or all.")
    ratio: str | float | dict[str, int] = Field(
        AUTO, description="Cached tokens to recompute: auto, a share from 0 to 1, or tokens=N."
    )
    blend: bool = Field(True, description="Reuse chunk KV; false computes every prompt in full.")
    min_gain: float | None = Field(
        0.1, ge=0.0, lt=1.0, description="Blend where the first token comes earlier by this share; off: always."
    )
    lazy_fill: Literal["first", "second", "never"] = Field(
        "second", description="At which use a passage without KV is ingested, after the answer: first, second or never."
    )
    order: OrderMode = Field(
        "auto",
        description="Order of the passages: retrieved, stable, so that prompts begin alike, or auto: stable where the "
        "server cannot blend.",
    )
    cite: bool = Field(False, description="Number the passages and ask for citations; the KV stays the same.")
    top_k: int = Field(4, ge=1, description="Chunks retrieved for a question.")
    chunk_tokens: int = Field(256, ge=32, description="Most tokens of a chunk.")
    chunk_overlap: int = Field(0, ge=0, description="Tokens that neighbouring chunks share.")
    document_seconds: float = Field(120.0, gt=0, description="Most seconds for reading one file.")
    document_mb: int = Field(2048, ge=256, description="Most MiB of memory for reading one file.")
    trace: Path | None = Field(None, description="Append the chunks that each question used to this file.")
    max_tokens: int = Field(256, ge=1, description="Most tokens of an answer.")
    temperature: float = Field(0.0, ge=0.0, description="0 is greedy.")
    system: str | None = Field(None, description="System text. (KV)")
    instruction: str | None = Field(None, description="Text before the passages. (KV)")
    tenant: str = Field("", description="KV of different tenants is never shared. (KV)")
    kv_budget_gb: float = Field(50.0, gt=0, description="Most gigabytes of KV files.")
    memory_budget_gb: float = Field(4.0, ge=0, description="Most gigabytes of hot KV in memory.")
    kv: Literal["now", "lazy", "none"] = Field(
        "now",
        description="When a new chunk's KV is computed: now, lazy (after questions that used it) or none (by warm).",
    )
    ingest_in_flight: int = Field(8, ge=1, description="Chunks that a vLLM server is asked to ingest at once.")
    ingest_rate: float | None = Field(
        None, gt=0, description="Most tokens of chunks ingested in a second; off: no limit."
    )
    pin: bool | None = Field(
        None, description="Keep the KV of ingested and warmed chunks from being evicted from a server's memory."
    )
    kv_ttl: float | None = Field(
        None, gt=0, description="Age at which a chunk's KV is removed, such as 30d, 12h or 90m; off: never."
    )
    ingest_key_file: Path | None = Field(None, description="File with the key that a server requires for ingestion.")
    lock_timeout_s: float = Field(30.0, ge=0, description="How long to wait for another process that is writing.")

    @field_validator("engine", mode="before")
    @classmethod
    def _servers(cls, value: Any) -> Any:
        from lmcache_rag.engines.vllm_client import server_urls

        if value in ("embedded", ["embedded"]):
            return "embedded"
        if not isinstance(value, str | list | tuple):
            return value
        try:
            return ",".join(server_urls(value))
        except ConfigError as problem:
            raise PydanticCustomError("engine", "{words}", {"words": str(problem)}) from None

    @property
    def fills(self) -> Literal["first", "second", "never"]:
        """At which use a passage without KV is ingested: by `lazy_fill`, and never with `kv = "none"`."""
        return "never" if self.kv == "none" else self.lazy_fill

    @field_validator("min_gain", "ingest_rate", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value == "off" else value

    @field_validator("kv_ttl", mode="before")
    @classmethod
    def _age(cls, value: Any) -> Any:
        if value in (None, "off"):
            return None
        try:
            return seconds(value)
        except ConfigError as problem:
            raise PydanticCustomError("kv_ttl", "{words}", {"words": str(problem)}) from None

    @field_validator("model", "embedder", mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("ratio", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> Any:
        try:
            return (parse_budget_text(value) if isinstance(value, str) else parse_budget(value)).wire
        except ConfigError as problem:
            raise PydanticCustomError("ratio", "{words}", {"words": str(problem)}) from None

    @field_validator("policy")
    @classmethod
    def _known(cls, name: str) -> str:
        from lmcache_rag.policies import get_policy  # not needed to show the command line's help

        try:
            return get_policy(name).name
        except ConfigError as problem:  # as pydantic's own error, or it would put "Value error" before the message
            raise PydanticCustomError("policy", "{words}", {"words": str(problem)}) from None

    @classmethod
    def load(cls, store: Path | str | None = None, **arguments: Any) -> Settings:
        """Read all sources. Arguments that are None or an empty list count as not set.

        Raises:
            ConfigError: A value is not valid, or the file has an unknown name.
        """
        values = {name: value for name, value in arguments.items() if value is not None and value != []}
        if store is not None:
            values["store"] = Path(store)
        try:
            folder = values.get("store") or _Place().store
            return _with_file(Path(folder) / FILE)(**values)
        except ValidationError as problem:
            raise ConfigError(
                "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in problem.errors()),
                remedy=f"See `lmcache-rag settings` for all names, and {FILE} in the store.",
            ) from problem
        except (ValueError, OSError) as problem:  # the TOML itself
            raise ConfigError(f"The store's {FILE} cannot be read: {problem}", remedy="Mend or remove it.") from problem


class _Place(BaseSettings):
    """The store's path, which must be known before its settings file can be read."""

    model_config = SettingsConfigDict(env_prefix="LMCACHE_RAG_", env_ignore_empty=True, extra="ignore")
    store: Path = Settings.model_fields["store"].default


def _with_file(path: Path) -> type[Settings]:
    """Settings that read this file after the environment."""

    class WithFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)

    return WithFile
