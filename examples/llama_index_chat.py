"""A LlamaIndex chat that streams: earlier turns come after the passages, so that each turn reuses their KV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.node_parser import SentenceSplitter
from lmcache_rag.integrations.llama_index import BlendEvent, EmbedderEmbedding, LMCacheVectorStore, as_blend_chat_engine

from lmcache_rag import Workspace

DATA = Path(__file__).parent / "data" / "documents"
QUESTIONS = ["What was ENIAC?", "Who programmed it?", "What came after it?"]
REUSED: list[dict[str, Any]] = []


class Listener(BaseEventHandler):
    """Receives what every answer reused, as any tracer does."""

    def handle(self, event: Any, **kwargs: Any) -> None:
        """Note it."""
        if isinstance(event, BlendEvent):
            REUSED.append(event.stats)


def main(store: str = "llama-index-chat-store", embed_model: Any = None, **settings: Any) -> list[dict[str, Any]]:
    """Chat; returns what each answer reused."""
    listener, dispatcher = Listener(), get_dispatcher()
    dispatcher.add_event_handler(listener)
    REUSED.clear()
    with Workspace.open(store, **{"max_tokens": 48, **settings}) as workspace:
        vector_store = LMCacheVectorStore(None, workspace)
        vector_store.clear()  # an example: every run begins anew
        index = VectorStoreIndex.from_documents(
            [Document(text=(DATA / "early-computers.txt").read_text(), id_="early-computers.txt")],
            storage_context=StorageContext.from_defaults(vector_store=vector_store),
            transformations=[SentenceSplitter(chunk_size=200, chunk_overlap=0)],
            embed_model=embed_model or EmbedderEmbedding(workspace.embedder),
        )
        chat = as_blend_chat_engine(index, workspace, similarity_top_k=3)
        for question in QUESTIONS:
            print(question, "→ ", end="")
            for piece in chat.stream_chat(question).response_gen:
                print(piece, end="", flush=True)
            facts = REUSED[-1]
            print(f"\n   {facts['reused_tokens']} of {facts['prompt_tokens']} prompt tokens came from cached chunks.")
    dispatcher.event_handlers.remove(listener)
    return list(REUSED)


if __name__ == "__main__":
    main()
