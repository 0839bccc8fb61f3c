"""The secret that vLLM's first process draws."""

from __future__ import annotations

import pytest

from lmcache_rag.connector.secret import draw_secret, find_secret


@pytest.mark.parametrize("blanks", ["", " ", "\t \n"])
def test_a_secret_of_blanks_is_replaced_by_a_drawn_one(blanks: str) -> None:
    environment = {"LMCACHE_RAG_SECRET": blanks}
    draw_secret(environment)
    assert find_secret("", environment) != b""
