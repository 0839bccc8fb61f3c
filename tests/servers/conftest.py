"""The tests of this folder start real servers. vLLM's own imports warn, so it is imported once here, without."""

from __future__ import annotations

import importlib
import warnings

from contract_kit import missing

if not missing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")
