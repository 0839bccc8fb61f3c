"""Which stored documents were read by another version of their parser, or of the splitter, than today's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lmcache_rag.documents.formats import format_by_record, parser_of_record
from lmcache_rag.documents.splitter import splitter_version

if TYPE_CHECKING:
    from lmcache_rag.store import DocumentRecord


def was_file(record: DocumentRecord) -> bool:
    """Whether load_document made it."""
    path = Path(record.doc_id)
    facts = record.metadata
    return (
        record.doc_id == record.source
        and path.is_absolute()
        and facts.get("name") == path.name
        and "media_type" in facts
    )


def is_outdated(record: DocumentRecord) -> bool:
    """Whether reading the same file today could give other chunks. What a program gave is never outdated."""
    if not record.splitter or not was_file(record):
        return False
    media_type = str(record.metadata["media_type"])
    today = format_by_record(media_type, str(record.metadata["name"])).parser
    by_same_splitter = record.splitter.startswith(f"{splitter_version()}, ")
    return not by_same_splitter or parser_of_record(record.parser, media_type) != today
