"""Files in, documents out, chunks out.

::

    find_files(paths) ─► Path ─► load_document ─► Document ─► Splitter.split_document ─► Chunk, Chunk, …
                     └─► DocumentError (a path that cannot be read; the others are read)
"""

from lmcache_rag.documents.finding import find_files
from lmcache_rag.documents.isolation import ReadLimits
from lmcache_rag.documents.loading import MAX_BYTES, load_document
from lmcache_rag.documents.splitter import Splitter
from lmcache_rag.documents.types import Chunk, Document

__all__ = ["MAX_BYTES", "Chunk", "Document", "ReadLimits", "Splitter", "find_files", "load_document"]
