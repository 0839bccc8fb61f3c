"""Examples for LMCache's operator, production-stack, llm-d and Ray: valid objects, and what `serve` would start."""

from __future__ import annotations

import json
from typing import Any

import kubernetes_validate
import pytest
from chart_kit import CASES, COORDINATOR, KUBERNETES, documents, options, platforms, ray_engine, served

from lmcache_rag.serving.tiers import second_tier

FILES = ("operator.yaml", "production-stack.yaml", "llm-d/kustomization.yaml", "llm-d/patch.yaml", "ray-service.yaml")
SERVE = served(CASES["defaults"])
NODE = "tcp://kv.rag.svc.cluster.local"  # the Service of the operator's LMCacheEngine


def connector(options: dict[str, Any]) -> dict[str, Any]:
    """The connector's settings, but for LMCache's address."""
    found: dict[str, Any] = json.loads(json.dumps(options["--kv-transfer-config"]))
    del found["kv_connector_extra_config"]["lmcache.mp.host"]
    return found


def test_every_file_is_one_that_is_checked() -> None:
    found = {
        str(file.relative_to(KUBERNETES)) for file in KUBERNETES.rglob("*.yaml") if "lmcache-rag" not in file.parts[-3:]
    }
    assert {name for name in found if not name.startswith("lmcache-rag/")} == set(FILES)
    page = (KUBERNETES.parents[1] / "docs" / "kubernetes.md").read_text()
    for name in FILES:
        assert "Not run on a cluster" in (KUBERNETES / name).read_text() or name == "llm-d/patch.yaml"
        assert f"examples/kubernetes/{name}" in page


@pytest.mark.parametrize("name", ["operator.yaml"])
def test_kubernetes_own_objects_are_valid(name: str) -> None:
    checked = 0
    for found in documents(name):
        if not found["apiVersion"].startswith("lmcache."):
            kubernetes_validate.validate(found, "1.37", strict=True)
            checked += 1
    assert checked == 3


def test_pods_of_other_kinds_are_valid() -> None:
    (patch,) = documents("llm-d/patch.yaml")
    (ray,) = documents("ray-service.yaml")
    cluster = ray["spec"]["rayClusterConfig"]
    pods = [patch["spec"]["template"], cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    for pod in pods:
        for container in pod["spec"]["containers"]:
            container.setdefault("image", "the base's")
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod["spec"]}
        kubernetes_validate.validate(whole, "1.37", strict=True)


@pytest.mark.parametrize("name", ["operator", "production-stack", "llm-d"])
def test_vllm_gets_what_serve_gives_it(name: str) -> None:
    usual, found = options(SERVE.vllm), options(platforms()[name]["vllm"])
    assert connector(found) == connector(usual)
    host = found["--kv-transfer-config"]["kv_connector_extra_config"]["lmcache.mp.host"]
    assert host == ("tcp://localhost" if name == "llm-d" else NODE)
    for option in ("--max-num-batched-tokens", "--gpu-memory-utilization", "--scheduling-policy"):
        assert found[option] == usual[option]


@pytest.mark.parametrize("name", ["operator", "llm-d", "Ray"])
def test_lmcache_gets_what_serve_gives_it(name: str) -> None:
    usual, found = options(SERVE.lmcache), options(platforms()[name]["lmcache"])
    if name == "operator":
        for option in ("--host", "--http-host", "--l1-size-gb"):  # others must reach it; its own size
            del usual[option]
        assert found["--chunk-size"] == options(COORDINATOR)["--chunk-size"]
        assert options(platforms()[name]["coordinator"]) == {
            name: value for name, value in options(COORDINATOR).items() if name != "--host"
        }
    assert {option: found[option] for option in usual} == usual


def test_the_operators_tier_connects_again() -> None:
    """LMCache's adapter `resp`, which the operator's own field makes, does not."""
    found = options(platforms()["operator"]["lmcache"])["--l2-adapter"]
    theirs, ours = found if isinstance(found, dict) else json.loads(found), json.loads(second_tier("redis://v:1"))
    assert theirs["shared"]
    assert {name: theirs[name] for name in ours} == ours | {"startup_nodes": theirs["startup_nodes"]}
    (engine,) = (each for each in documents("operator.yaml") if each["kind"] == "LMCacheEngine")
    assert "l2Backend" not in engine["spec"]


def test_rays_engine_gets_what_serve_gives_vllm() -> None:
    usual, found = options(SERVE.vllm), ray_engine()
    assert found["kv_transfer_config"] == usual["--kv-transfer-config"]
    assert str(found["max_num_batched_tokens"]) == usual["--max-num-batched-tokens"]
    assert str(found["gpu_memory_utilization"]) == usual["--gpu-memory-utilization"]
    assert found["scheduling_policy"] == usual["--scheduling-policy"]


def test_containers_of_a_pod_share_its_memory() -> None:
    for name in ("llm-d/patch.yaml", "ray-service.yaml"):
        (found,) = documents(name)
        spec = (
            found["spec"]["template"]["spec"]
            if name.startswith("llm")
            else found["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
        )
        assert [each["volumeMounts"] for each in spec["containers"]] == [[{"name": "shm", "mountPath": "/dev/shm"}]] * 2
        assert spec["shareProcessNamespace"] is True
