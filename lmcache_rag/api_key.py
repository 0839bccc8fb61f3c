"""The key that a vLLM server asks for, from the environment: a variable of ours, or the one that vLLM itself reads.

OPENAI_API_KEY is none of them: it is a secret that no other server should see.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

NAMES = ("LMCACHE_RAG_API_KEY", "VLLM_API_KEY")
REMEDY = f"Put it into the environment variable {NAMES[0]} or {NAMES[1]}."


def api_key(first: str = NAMES[0], environment: Mapping[str, str] | None = None) -> str:
    """The key, "" where there is none.

    Args:
        first: Which of the two variables counts where both are set.
        environment: Variables; default: this process's.
    """
    found = os.environ if environment is None else environment
    return next((key for name in (first, *NAMES) if (key := found.get(name))), "")
