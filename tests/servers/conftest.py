"""The tests of this folder start real servers. Imports of vLLM and LMCache warn: here once, without."""

from __future__ import annotations

import importlib
import warnings

from contract_kit import missing

if not missing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("lmcache_rag.connector.metrics")
