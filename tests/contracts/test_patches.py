"""What every patch replaces is there, in vLLM and in LMCache."""

from __future__ import annotations

import inspect
import re
import sys
import types

import pytest
from patch_kit import patches

from lmcache_rag.connector.patching import Patch

pytestmark = [pytest.mark.filterwarnings("ignore")]


def in_source(owner: type, name: str) -> bool:
    """Whether instances get that attribute; it may stand in a parent's `__init__`, or be a dataclass's field."""
    parents = [each for each in owner.__mro__ if each.__module__.startswith(("vllm.", "lmcache."))]
    return any(re.search(rf"\bself\.{name}\b.* = ", inspect.getsource(each)) for each in parents)


@pytest.mark.parametrize("patch", patches(), ids=lambda patch: patch.qualified_name)
def test_what_is_replaced_is_there(patch: Patch) -> None:
    owner = patch.owner()
    if isinstance(owner, type) and not hasattr(owner, patch.name):
        assert in_source(owner, patch.name)
    else:
        assert hasattr(owner, patch.name)
        assert not isinstance(owner, types.ModuleType) or owner is sys.modules[patch.target.partition(":")[0]]
