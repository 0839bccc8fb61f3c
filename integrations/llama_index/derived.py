"""Texts in prompts that a vector store does not hold: parents that small nodes are merged into, windows around them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence

from llama_index.core.schema import BaseNode, MetadataMode

from lmcache_rag.errors import StoreError
from lmcache_rag.kv_manager import KVTotals
from lmcache_rag.kv_removal import IngestPrompts
from lmcache_rag.store import Store
from lmcache_rag.workspace import Workspace

from ..kv_registry import KVRegistry
from .prompts import node_text

log = logging.getLogger("lmcache_rag")

# The registries of the vector stores over each store.
_registries: weakref.WeakKeyDictionary[Store, weakref.WeakSet[KVRegistry]] = weakref.WeakKeyDictionary()


class DerivedTexts:
    """The derived texts of one vector store, in a space of their own. They leave with their document.

    Args:
        workspace: Has the registry.
        nodes: The registry of the vector store's nodes.
        prompts: For which KV is computed; empty: the workspace's.
    """

    def __init__(self, workspace: Workspace, nodes: KVRegistry, prompts: Sequence[IngestPrompts] = ()) -> None:
        self._nodes = nodes
        self.register = KVRegistry.of(
            workspace, space=_space_of(nodes), prompts=prompts, kv=nodes.policy.mode, pin=nodes.policy.pin
        )
        _registries.setdefault(workspace.store, weakref.WeakSet()).add(nodes)

    def add(self, nodes: Iterable[BaseNode]) -> KVTotals:
        """Register nodes that the vector store does not hold, and compute their KV."""
        found = list(nodes)
        groups = {node.node_id: _group_of(node, self._nodes) or node.ref_doc_id or "None" for node in found}
        return self.register.add({node.node_id: node_text(node) for node in found}, groups=groups)

    def groups(self, node_ids: Iterable[str]) -> set[str]:
        """Return the documents of these nodes of the vector store."""
        return {group for _, group in self._nodes.entries(node_ids).values()}

    def remove_orphans(self, groups: Iterable[str] | None = None) -> int:
        """Remove the texts of documents of which the vector store has no node any more.

        Args:
            groups: The documents; None: all.
        """
        if groups is None:
            groups = {group for _, group in self.register.entries(self.register.ids()).values()}
        orphans = [key for group in groups if not self._nodes.ids(group) for key in self.register.ids(group)]
        return self.register.remove(orphans)


def has_kv_for(workspace: Workspace, fingerprint: str) -> bool:
    """Return whether a vector store of this workspace computes KV for prompts with this fingerprint."""
    return any(fingerprint in each.fingerprints for each in list(_registries.get(workspace.store, ())))


def is_derived(node: BaseNode) -> bool:
    """Return whether a node's text is always the same, although no vector store holds it.

    So are parents, and windows: texts that a MetadataReplacementPostProcessor took from the node's own metadata.
    """
    return bool(node.child_nodes) or node.get_content(metadata_mode=MetadataMode.NONE) in node.metadata.values()


def register_derived(workspace: Workspace, nodes: Mapping[str, BaseNode]) -> set[str]:
    """Register those of the texts that are derived from registered nodes; their KV is computed as that of any of them.

    Args:
        workspace: Has the registry.
        nodes: The node of each text.

    Returns:
        The texts that were registered. None while another process writes to the store.
    """
    done: set[str] = set()
    for registry in list(_registries.get(workspace.store, ())):
        found = {text: _group_of(node, registry) for text, node in nodes.items() if text not in done}
        new = {text: group for text, group in found.items() if group is not None}
        if not new or workspace.store.read_only:
            continue
        derived = KVRegistry.of(workspace, space=_space_of(registry))
        try:
            with workspace.store.writing(timeout=0):
                derived.adopt(
                    {nodes[text].node_id: (text, group) for text, group in new.items()}, changes=derived.watch_changes()
                )
        except StoreError as problem:
            log.debug("parents and windows are registered at a later use: %s", problem)
            continue
        done |= new.keys()
    return done


def _space_of(nodes: KVRegistry) -> str:
    return f"{nodes.space}\x1ederived"


def _group_of(node: BaseNode, registry: KVRegistry) -> str | None:
    """Return the document of a node that is derived from registered ones; None: from none of this registry."""
    sources: Sequence[str] = [node.node_id, *(child.node_id for child in node.child_nodes or ())]
    if found := registry.entries(sources):
        return next(iter(found.values()))[1]
    # A parent of parents: its children are not registered either.
    return node.ref_doc_id if node.ref_doc_id is not None and registry.ids(node.ref_doc_id) else None
