"""The Helm chart of examples/kubernetes, rendered, and configurations in which it must agree with `serve --dry-run`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from commands_kit import make

KUBERNETES = Path(__file__).parents[2] / "examples" / "kubernetes"
CHART = KUBERNETES / "lmcache-rag"
SECRET = {"secret": {"name": "lmcache-rag"}}
VALKEY = {"kind": "valkey", "valkey": {"host": "kv.data", "port": 6380, "password": {"name": "valkey"}}}
S3 = {
    "kind": "s3",
    "s3": {"endpoint": "kv.s3.eu-west-1.amazonaws.com", "region": "eu-west-1", "credentials": {"name": "s3"}},
}
EVERYTHING: dict[str, Any] = {
    "replicas": 3,
    **{name: {"name": name.lower()} for name in ("secret", "apiKey", "ingestKey", "hfToken", "lmcacheHTTPKey")},
    "tier": VALKEY,
    "coordinator": {"enabled": True},
    "warm": {"enabled": True, "store": {"claim": "store", "path": "manuals"}},
    "ingest": {"enabled": True, "documents": {"claim": "documents"}, "store": {"claim": "store", "path": "manuals"}},
    "networkPolicy": {"from": [{"podSelector": {"matchLabels": {"app": "gateway"}}}]},
    "monitoring": {"enabled": True, "labels": {"release": "kube-prometheus-stack"}},
    "gpu": {"mode": "resourceClaim"},
}
COORDINATOR = (
    *("lmcache", "coordinator", "--host", "0.0.0.0", "--port", "9300", "--enable-blend-lookup", "--chunk-size", "64"),
    *("--checkpoint-path", "/state/checkpoint", "--checkpoint-interval", "10", "--metadata-path", "/state/metadata"),
)  # fmt: skip


class Case(NamedTuple):
    """Values of the chart, and what `serve` gets for the same: options of ours, and arguments for vLLM."""

    values: dict[str, Any]
    options: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default
    vllm: tuple[str, ...] = ()


CASES = {
    "defaults": Case({}),
    "two GPUs": Case({"gpu": {"count": 2}}, vllm=("--tensor-parallel-size", "2")),
    "larger chunks": Case({"chunkSize": 256, "lmcache": {"l1GB": 60}}, {"chunk_size": 256, "l1_gb": 60}),
    "what is kept": Case(
        {"lmcache": {"index": "all", "store": "ingest", "indexSize": 1000}},
        {"index": "all", "store": "ingest", "index_size": 1000},
    ),
    "Valkey": Case({**SECRET, "tier": VALKEY}, {"l2": ("redis://:${TIER_PASSWORD}@kv.data:6380",)}),
    "S3": Case(
        {**SECRET, "tier": S3},
        {"l2": ('{"type": "s3", "s3_endpoint": "kv.s3.eu-west-1.amazonaws.com", "s3_region": "eu-west-1"}',)},
    ),
    "a folder": Case({**SECRET, "tier": {"kind": "folder", "folder": {"claim": "kv"}}}, {"l2": ("/kv",)}),
    "a coordinator": Case(
        {**SECRET, "tier": VALKEY, "coordinator": {"enabled": True}},
        {
            "l2": ("redis://:${TIER_PASSWORD}@kv.data:6380",),
            "coordinator": "http://docs-lmcache-rag-coordinator:9300",
            "instance_id": "$(POD_NAME)",
        },
    ),
    "settings": Case(
        {"vllm": {"connector": {"lmcache_rag.min_gain": 0.2}, "extraArgs": ["--max-model-len", "8192"]}},
        {"connector": ("lmcache_rag.min_gain=0.2",)},
        ("--max-model-len", "8192"),
    ),
}  # fmt: skip


def served(case: Case) -> Any:
    """What `serve` starts for the same."""
    from lmcache_rag.connector.lmcache_server.settings import ServerSettings

    kept = {name: case.options[name] for name in ("index", "store", "index_size") if name in case.options}
    ours = {name: value for name, value in case.options.items() if name not in kept}
    if "l2" in ours:
        ours["secret_file"] = Path("/run/lmcache-rag/secret")
    return make(*case.vllm, host="0.0.0.0", keeps=ServerSettings(**kept), **{"l1_gb": 20} | ours)


def render(values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The objects of the chart, as release `docs`. Made once for the same values: not to be changed."""
    return _rendered(json.dumps(values or {}))


@cache
def _rendered(values: str) -> list[dict[str, Any]]:
    import helm_python

    with helm_python.Chart.load(str(CHART)) as chart:
        texts = chart.render(json.loads(values), name="docs", namespace="rag")
    files = [text for name, text in texts.items() if not name.endswith(".txt")]
    return [found for text in files for found in yaml.safe_load_all(text) if found]


def one(objects: Iterable[dict[str, Any]], kind: str, end: str = "") -> dict[str, Any]:
    """The object of this kind whose name ends so."""
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(end)]
    return found


def containers(workload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The containers of a workload by name, without those that only prepare."""
    return {each["name"]: each for each in workload["spec"]["template"]["spec"]["containers"]}


def read(words: Sequence[str]) -> list[Any]:
    """The words of a command; JSON is read, as its spaces and the order of its keys mean nothing."""
    return [json.loads(word) if word.startswith("{") else word for word in words]


def options(words: Sequence[str]) -> dict[str, Any]:
    """The options of a command with their values; without a value None."""
    found: dict[str, Any] = {}
    for at, word in enumerate(words):
        if word.startswith("--"):
            following = words[at + 1] if at + 1 < len(words) else "--"
            found[word] = None if following.startswith("--") else read([following])[0]
    return found


def documents(name: str) -> list[dict[str, Any]]:
    """The objects of a file in examples/kubernetes."""
    return [found for found in yaml.safe_load_all((KUBERNETES / name).read_text()) if found]


def platforms() -> dict[str, dict[str, list[str]]]:
    """By platform: the command lines of vLLM and LMCache that its example has, without program and model."""
    engine, coordinator, deployment, *_ = documents("operator.yaml")
    spec = engine["spec"]
    server = spec["server"]
    made = [  # by the operator, of fields
        *("--port", str(server["port"]), "--http-port", str(server["httpPort"])),
        *("--chunk-size", str(server["chunkSize"]), "--l1-size-gb", str(spec["l1"]["sizeGB"])),
        *("--eviction-policy", "LRU"),
    ]
    (stack,) = documents("production-stack.yaml")
    model = stack["servingEngineSpec"]["modelSpec"][0]["vllmConfig"]
    (patch,) = documents("llm-d/patch.yaml")
    both = containers(patch)
    (ray,) = documents("ray-service.yaml")
    workers = ray["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]
    return {
        "operator": {
            "vllm": containers(deployment)["vllm"]["command"][3:],
            "lmcache": [*made, *spec["extraArgs"]],
            "coordinator": ["--port", str(coordinator["spec"]["port"]), *coordinator["spec"]["extraArgs"]],
        },
        "production-stack": {"vllm": ["--gpu-memory-utilization", model["gpuMemoryUtilization"], *model["extraArgs"]]},
        "llm-d": {"vllm": both["modelserver"]["args"][1:], "lmcache": both["lmcache"]["command"][2:]},
        "Ray": {"lmcache": {each["name"]: each for each in workers["spec"]["containers"]}["lmcache"]["command"][2:]},
    }


def ray_engine() -> dict[str, Any]:
    """Arguments of the engine in Ray's example."""
    (ray,) = documents("ray-service.yaml")
    (app,) = yaml.safe_load(ray["spec"]["serveConfigV2"])["applications"]
    found: dict[str, Any] = app["args"]["llm_configs"][0]["engine_kwargs"]
    return found
