"""The one place that turns a node into the text that the model reads."""

from __future__ import annotations

from llama_index.core.schema import BaseNode, MetadataMode


def node_text(node: BaseNode) -> str:
    """A node's text with the metadata that it shows to LLMs: the same at ingestion and in a question.

    LlamaIndex's own synthesizers read nodes so too. A node whose metadata for LLMs changes is another text, and gets
    another KV.
    """
    return str(node.get_content(metadata_mode=MetadataMode.LLM))
