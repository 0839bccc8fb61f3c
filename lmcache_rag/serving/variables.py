"""Which variables of the environment LMCache gets: those that it needs, and no passwords of others.

Whoever reaches LMCache's HTTP port can have it show its environment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from lmcache_rag.serving.tiers import variables

_NAMES = {
    "DO_NOT_TRACK",
    "HOME",
    "HOSTNAME",
    "LANG",
    "LANGUAGE",
    "LOGNAME",
    "PATH",
    "SHELL",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TEMP",
    "TERM",
    "TMP",
    "TMPDIR",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
}
_PREFIXES = (
    "CUDA_",
    "LC_",
    "LD_",
    "LMCACHE_",
    "MKL_",
    "NCCL",
    "NUMBA_",
    "NVIDIA_",
    "OMP_",
    "OPENBLAS_",
    "PROMETHEUS_",
    "PYTHON",
    "PYTORCH_",
    "TORCH",
    "TRITON_",
    "UCX_",
)
_NOT = ("LMCACHE_RAG_",)  # ours: the secret, keys
_BY_TIER = {
    "s3": ("AWS_",),
    "sagemaker_hyperpod": ("AWS_", "SAGEMAKER_"),
    "bigtable": ("GOOGLE_",),
    "hfbucket": ("HF_",),
}
_PROXIES = {f"{kind}_proxy" for kind in ("http", "https", "no", "all")}


def for_lmcache(environment: Mapping[str, str], tiers: Sequence[str] = ()) -> dict[str, str]:
    """The variables that LMCache gets.

    Args:
        environment: Those that there are.
        tiers: LMCache's JSON of each second tier; some need variables of their own, and any may name some.
    """
    kinds = {str(json.loads(tier).get("type")) for tier in tiers}
    prefixes = (*_PREFIXES, *(prefix for kind in kinds for prefix in _BY_TIER.get(kind, ())))
    named = variables(tiers)
    proxies = _PROXIES if kinds & _BY_TIER.keys() else set()

    def wanted() -> Iterable[str]:
        for name in environment:
            usual = name in _NAMES or name.startswith(prefixes) or name.lower() in proxies
            if name in named or (usual and not name.startswith(_NOT)):
                yield name

    return {name: environment[name] for name in wanted()}
