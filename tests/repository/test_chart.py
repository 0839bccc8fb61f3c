"""The Helm chart: rendered by Helm's own code, checked against Kubernetes' schemas and against `serve --dry-run`."""

from __future__ import annotations

import json
import re
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from chart_kit import (
    CASES,
    CHART,
    COORDINATOR,
    EVERYTHING,
    S3,
    SECRET,
    Case,
    containers,
    one,
    options,
    read,
    render,
    served,
)

OLDEST, NEWEST = "1.34", "1.37"  # the first with resource claims in version 1, and the newest known
OPERATOR = ("PodMonitor", "PrometheusRule")  # of Prometheus' operator: Kubernetes has no schema for them
ALL = {"defaults": {}, "everything": EVERYTHING, **{name: case.values for name, case in CASES.items()}}


def test_the_chart_has_no_findings() -> None:
    report = helm_python.lint(str(CHART), EVERYTHING, strict=True)
    assert report["errors"] == []
    assert [found["error"] for found in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("name", ALL)
def test_objects_are_those_that_kubernetes_knows(name: str) -> None:
    for found in render(ALL[name]):
        if found["kind"] not in OPERATOR:
            kubernetes_validate.validate(found, OLDEST if name == "everything" else NEWEST, strict=True)


@pytest.mark.parametrize("name", CASES)
def test_the_commands_are_those_of_serve(name: str) -> None:
    case = CASES[name]
    both, made = containers(one(render(case.values), "StatefulSet")), served(case)
    vllm = both["vllm"]["command"]
    assert vllm[:3] == ["vllm", "serve", "Qwen/Qwen3-8B"]
    assert read(vllm[3:]) == read(made.vllm[2:])
    lmcache = both["lmcache"]["command"]
    assert lmcache[: lmcache.index("server")] in (["lmcache"], ["python", "-m", "lmcache_rag.serving.lmcache_server"])
    assert read(lmcache[lmcache.index("server") :]) == read(made.lmcache)


def test_a_tiers_placeholders_are_filled_in() -> None:
    """By the program that fills them in; the variable is one of the container's."""
    lmcache = containers(one(render(CASES["Valkey"].values), "StatefulSet"))["lmcache"]
    assert lmcache["command"][:3] == ["python", "-m", "lmcache_rag.serving.lmcache_server"]
    (variable,) = re.findall(r"\$\{(\w+)\}", " ".join(lmcache["command"]))
    assert {each["name"]: each for each in lmcache["env"]}[variable]["valueFrom"]["secretKeyRef"]["name"] == "valkey"


def test_the_ingest_key_is_a_file_of_the_user() -> None:
    pod = one(render({"ingestKey": {"name": "k"}}), "StatefulSet")
    found = options(containers(pod)["vllm"]["command"])
    assert (
        found["--kv-transfer-config"]["kv_connector_extra_config"]["lmcache_rag.ingest_key_file"]
        == "/run/lmcache-rag/ingest-key"
    )
    assert found["--middleware"] == "lmcache_rag.connector.authorization.IngestKeyMiddleware"
    assert "umask 077" in pod["spec"]["template"]["spec"]["initContainers"][0]["command"][-1]


def test_the_coordinator_has_the_servers_chunk_size() -> None:
    objects = render(EVERYTHING)
    assert containers(one(objects, "Deployment"))["coordinator"]["command"] == list(COORDINATOR)
    server = options(containers(one(objects, "StatefulSet"))["lmcache"]["command"])
    assert server["--coordinator-url"] == f"http://{one(objects, 'Service', '-coordinator')['metadata']['name']}:9300"
    assert "--coordinator-event-reporting" in server
    larger = render(EVERYTHING | {"chunkSize": 128})
    commands = [containers(one(larger, kind)) for kind in ("Deployment", "StatefulSet")]
    assert options(commands[0]["coordinator"]["command"])["--chunk-size"] == "128"
    assert options(commands[1]["lmcache"]["command"])["--chunk-size"] == "128"


def test_nothing_of_the_host_is_shared() -> None:
    for name, values in ALL.items():
        for pod in pods(render(values)):
            assert not {"hostIPC", "hostPID", "hostNetwork"} & set(pod), name
            assert not [volume for volume in pod["volumes"] if "hostPath" in volume], name
            assert pod["automountServiceAccountToken"] is False
            assert pod["securityContext"]["runAsNonRoot"] is True
            for container in [*pod["containers"], *pod.get("initContainers", [])]:
                safe = container["securityContext"]
                assert safe["allowPrivilegeEscalation"] is False
                assert safe["readOnlyRootFilesystem"] is True
                assert safe["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["limits"]["memory"]


def test_both_containers_share_memory_and_processes() -> None:
    pod = one(render(), "StatefulSet")["spec"]["template"]["spec"]
    assert pod["shareProcessNamespace"] is True
    shared = [
        mount["name"]
        for each in pod["containers"]
        for mount in each["volumeMounts"]
        if mount["mountPath"] == "/dev/shm"
    ]
    assert shared == ["shm", "shm"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "24Gi"}, "LMCache's 20 GB are in there"


def test_secrets_are_named_and_never_written() -> None:
    for container in containers(one(render(EVERYTHING), "StatefulSet")).values():
        for variable in container["env"]:
            if re.search("KEY$|TOKEN$|PASSWORD$|SECRET$", variable["name"]):
                assert "value" not in variable, variable["name"]


@pytest.mark.parametrize("mode", ["devicePlugin", "resourceClaim"])
def test_both_containers_see_the_gpus(mode: str) -> None:
    objects = render({"gpu": {"mode": mode, "count": 2}})
    both = containers(one(objects, "StatefulSet"))
    if mode == "devicePlugin":
        assert both["vllm"]["resources"]["limits"]["nvidia.com/gpu"] == 2
        assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"} in both["lmcache"]["env"]
        assert "nvidia.com/gpu" not in both["lmcache"]["resources"]["limits"], "then the pod would need four"
        return
    assert all(both[name]["resources"]["claims"] == [{"name": "gpus"}] for name in ("vllm", "lmcache"))
    template = one(objects, "ResourceClaimTemplate")
    assert template["spec"]["spec"]["devices"]["requests"][0]["exactly"]["count"] == 2
    (named,) = one(objects, "StatefulSet")["spec"]["template"]["spec"]["resourceClaims"]
    assert named["resourceClaimTemplateName"] == template["metadata"]["name"]


# -- who reaches what -------------------------------------------------------------------------------------------------


def test_others_reach_vllms_port_alone() -> None:
    objects = render()
    assert reached(objects, "server") == {8000: None}
    lmcache = options(containers(one(objects, "StatefulSet"))["lmcache"]["command"])
    assert (lmcache["--host"], lmcache["--http-host"]) == ("localhost", "127.0.0.1")
    assert {port["targetPort"] for each in objects if each["kind"] == "Service" for port in each["spec"]["ports"]} == {
        "http"
    }


def test_the_coordinator_is_for_servers_and_prometheus() -> None:
    objects = render(EVERYTHING)
    (peers,) = reached(objects, "coordinator").values()
    selectors = [peer["podSelector"]["matchLabels"] for peer in peers if "podSelector" in peer]
    assert [each["app.kubernetes.io/component"] for each in selectors] == ["server"]
    assert [peer for peer in peers if "podSelector" not in peer] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    ]
    assert len(reached(render(EVERYTHING | {"monitoring": {"enabled": False}}), "coordinator")[9300]) == 1
    assert reached(objects, "ingest") == {}


def test_metrics_of_lmcache_are_for_prometheus() -> None:
    objects = render(EVERYTHING)
    ports = reached(objects, "server")
    assert set(ports) == {8000, 8089}
    assert ports[8089] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert {"podSelector": {"matchLabels": {"app": "gateway"}}} in ports[8000]
    assert None not in ports.values()


# -- readiness --------------------------------------------------------------------------------------------------------


def test_a_pod_is_ready_when_its_store_is_warm() -> None:
    found = containers(one(render(EVERYTHING), "StatefulSet"))
    assert found["warm"]["readinessProbe"]["exec"]["command"] == ["test", "-f", "/run/warm/ready"]
    assert {"name": "WARM_STORE", "value": "/store/manuals"} in found["warm"]["env"]
    assert "readinessProbe" not in found["lmcache"], "vLLM answers without LMCache"
    assert "warm" not in containers(one(render(), "StatefulSet"))


def test_the_job_ingests_into_each_replica_or_one() -> None:
    job = containers(one(render(EVERYTHING), "Job"))["ingest"]["command"]
    assert options(job)["--engine"] == "http://docs-lmcache-rag-0.docs-lmcache-rag-pods:8000"
    alone = render(EVERYTHING | {"coordinator": {"enabled": False}})
    assert options(containers(one(alone, "Job"))["ingest"]["command"])["--engine"].count("http://") == 3
    assert one(alone, "Service", "-pods")["spec"]["publishNotReadyAddresses"] is True, "they are not ready before"


def test_vllms_health_is_its_own() -> None:
    vllm = containers(one(render({"vllm": {"startSeconds": 1801}}), "StatefulSet"))["vllm"]
    assert {vllm[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        "/health"
    }
    assert vllm["startupProbe"]["failureThreshold"] == 181


# -- wrong values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 2}, "secret.name is needed"),
        ({"tier": S3}, "secret.name is needed"),
        ({**SECRET, "coordinator": {"enabled": True}}, "needs a tier"),
        ({**SECRET, "tier": {"kind": "valkey"}}, "tier.valkey.host is empty"),
        ({**SECRET, "tier": {"kind": "s3"}}, "tier.s3.endpoint is empty"),
        ({**SECRET, "tier": {"kind": "folder"}}, "tier.folder.claim is empty"),
        ({**SECRET, "tier": {"kind": "json"}}, "tier.json has no type"),
        ({"warm": {"enabled": True}}, "warm.store.claim"),
        ({"ingest": {"enabled": True}}, "ingest.store.claim"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm_python.HelmError, match=message):
        render(values)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"chunksize": 64}, "chunksize"),
        ({"chunkSize": 50}, "chunkSize"),
        ({"lmcache": {"store": "some"}}, "store"),
        ({"vllm": {"connector": {"policy": "query"}}}, "policy"),
        ({"secret": {"secretName": "x"}}, "secretName"),
        ({"tier": {"kind": "redis"}}, "kind"),
        ({"replicas": "two"}, "replicas"),
    ],
)  # fmt: skip
def test_the_schema_refuses_a_wrong_value(values: dict[str, Any], place: str) -> None:
    with helm_python.Chart.load(str(CHART)) as chart, pytest.raises(helm_python.HelmError, match=place):
        chart.validate_schema(values)


def test_the_schema_has_all_values_and_no_others() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    del schema["properties"]["global"]  # Helm's own

    def compare(value: Any, found: dict[str, Any], place: str) -> None:
        if "properties" in found and place != "json":
            assert set(value) == set(found["properties"]), place
            for name, each in found["properties"].items():
                compare(value[name], each, name)

    compare(values, schema, "values")


def test_versions_are_the_projects() -> None:
    import tomllib

    project = tomllib.loads((CHART.parents[2] / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == project["version"]


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        each["spec"]["template"]["spec"] for each in objects if each["kind"] in ("StatefulSet", "Deployment", "Job")
    ]


def reached(objects: list[dict[str, Any]], component: str) -> dict[int, list[dict[str, Any]] | None]:
    """The ports of these pods that others reach, and who; None: all."""
    found: dict[int, list[dict[str, Any]] | None] = {}
    for policy in (each["spec"] for each in objects if each["kind"] == "NetworkPolicy"):
        if policy["podSelector"]["matchLabels"]["app.kubernetes.io/component"] != component:
            continue
        for rule in policy.get("ingress", []):
            for port in rule["ports"]:
                before = found.get(port["port"], [])
                found[port["port"]] = None if before is None or "from" not in rule else [*before, *rule["from"]]
    return found


def test_cases_differ() -> None:
    made = [served(case) for case in CASES.values()]
    assert len({(each.vllm, each.lmcache) for each in made}) == len(CASES)
    assert isinstance(CASES["defaults"], Case)
