"""A folder that changes: an IngestionPipeline updates new, changed and removed files, and their KV with them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore
from lmcache_rag.integrations.llama_index import EmbedderEmbedding, LMCacheVectorStore, as_blend_query_engine

from lmcache_rag import Workspace

DATA = Path(__file__).parent / "data" / "documents"


def main(store: str = "llama-index-folder-store", embed_model: Any = None, **settings: Any) -> list[int]:
    """Ingest three times; returns how many texts had to be computed each time."""
    computed = []
    with Workspace.open(store, **{"max_tokens": 48, **settings}) as workspace, tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        vector_store = LMCacheVectorStore(None, workspace)
        vector_store.clear()  # an example: every run begins anew
        embed_model = embed_model or EmbedderEmbedding(workspace.embedder)
        pipeline = IngestionPipeline(
            transformations=[SentenceSplitter(chunk_size=256, chunk_overlap=0), embed_model],
            vector_store=vector_store,
            docstore=SimpleDocumentStore(),  # pipeline.persist() and .load() keep it between runs of a program
            docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
        )
        for name in ("atom.txt", "insects.txt"):
            shutil.copy(DATA / name, folder)
        for change in ("two files", "nothing new", "one file changed, one gone, one new"):
            if change.startswith("one file"):
                (folder / "atom.txt").write_text((DATA / "atom.txt").read_text() + "\n\nAtoms are small.\n")
                (folder / "insects.txt").unlink()
                shutil.copy(DATA / "explorers.txt", folder)
            before = set(vector_store.kv.texts().values())
            pipeline.run(documents=SimpleDirectoryReader(place, filename_as_id=True).load_data())
            now = set(vector_store.kv.texts().values())
            computed.append(len(now - before))
            print(f"{change}: {len(now - before)} texts computed, {len(before - now)} dropped, {len(now)} in all")
        index = VectorStoreIndex.from_vector_store(vector_store, embed_model=embed_model)
        print(as_blend_query_engine(index, workspace).query("How small are atoms?"))
    return computed


if __name__ == "__main__":
    main()
