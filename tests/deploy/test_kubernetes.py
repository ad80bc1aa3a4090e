"""deploy/kubernetes: valid by Kubernetes' own schemas, and in agreement with the server's settings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from shardbook_server.rpc.health import PROCESS
from tests.deploy.files import (
    KUBERNETES,
    SERVER_VARIABLES,
    VARIABLES,
    drain_s,
    is_server_command,
    literal_passwords,
    read_yaml,
    server_settings,
    version,
)

#: gRPC probes are stable from this one on.
OLDEST = "1.27"
FILES = sorted(KUBERNETES.rglob("*.yaml"))
#: Kinds that Kubernetes itself has no schema for.
FOREIGN = {"Kustomization", "ServiceMonitor"}
OPTIONAL = {"network-policy.yaml", "service-monitor.yaml"}
MANIFESTS = [path for path in FILES if path.name != "kustomization.yaml"]
DEPLOYMENT = read_yaml(KUBERNETES / "deployment.yaml")
JOB = read_yaml(KUBERNETES / "migrate" / "job.yaml")
WORKLOADS = {"deployment": DEPLOYMENT, "job": JOB}
SERVICE = read_yaml(KUBERNETES / "service.yaml")


def _ids(path: Path) -> str:
    return path.relative_to(KUBERNETES).as_posix()


def _pod(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def _container(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = _pod(workload)["containers"]
    assert isinstance(container, dict)
    return container


def _values(workload: dict[str, Any]) -> dict[str, object]:
    return {item["name"]: item.get("value") for item in _container(workload)["env"]}


@pytest.mark.parametrize("release", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("path", MANIFESTS, ids=_ids)
def test_schema_of_kubernetes_is_met(path: Path, release: str) -> None:
    """Rule: valid, without unknown fields, for the oldest release that is supported and the newest that is known."""
    document = read_yaml(path)
    if document["kind"] in FOREIGN:
        assert "monitoring.coreos.com/v1" == document["apiVersion"]
        return
    kubernetes_validate.validate(document, release, strict=True)


def test_schema_would_find_a_mistake() -> None:
    """Rule: the check of the test above knows fields and types."""
    typo = copy.deepcopy(DEPLOYMENT)
    _pod(typo)["terminationGracePeriodSecond"] = 60
    wrong_type = copy.deepcopy(DEPLOYMENT)
    _container(wrong_type)["readinessProbe"]["grpc"]["port"] = "grpc"
    for document in (typo, wrong_type):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document, OLDEST, strict=True)


def test_kustomizations_name_every_file() -> None:
    """Rule: each manifest is in its folder's kustomization, or stands there as a comment that tells when."""
    for path in KUBERNETES.rglob("kustomization.yaml"):
        listed = set(read_yaml(path)["resources"])
        here = {other.name for other in path.parent.glob("*.yaml")} - {path.name}
        assert here - OPTIONAL == listed
        for name in here & OPTIONAL:
            assert f"# - {name}\n" in path.read_text()


def test_images_have_the_version() -> None:
    """Rule: with or without kustomize, it is this release's image that runs."""
    for workload in WORKLOADS.values():
        assert f"shardbook-server:{version()}" == _container(workload)["image"]
    for path in KUBERNETES.rglob("kustomization.yaml"):
        (image,) = read_yaml(path)["images"]
        assert ("shardbook-server", version()) == (image["name"], image["newTag"])


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_commands_and_settings_exist(workload: dict[str, Any]) -> None:
    """Rule: the image's entry point gets a command that exists, and settings that the server knows."""
    container = _container(workload)
    assert "command" not in container
    assert is_server_command(container["args"])
    assert set() == set(server_settings(_values(workload))) - SERVER_VARIABLES


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_database_url_comes_from_a_secret(workload: dict[str, Any]) -> None:
    """Rule: what may hold a password has no value here, only a reference."""
    for item in _container(workload)["env"]:
        secret = item["name"].endswith(("_URL", "_PASSWORD", "_TOKEN"))
        assert secret == ("secretKeyRef" in item.get("valueFrom", {}))
        assert secret == ("value" not in item)
    assert "SHARDBOOK_DATABASE_URL" in _values(workload)


def test_no_file_holds_a_secret() -> None:
    """Rule: no Secret, no URL with a password, in any of them."""
    assert [] == [path for path in MANIFESTS if read_yaml(path)["kind"] == "Secret"]
    assert [] == [found for path in FILES for found in literal_passwords(path.read_text())]


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_pods_have_no_rights_that_they_do_not_need(workload: dict[str, Any]) -> None:
    """Rule: the "restricted" pod security standard, a read-only root, and no token for Kubernetes."""
    pod, container = _pod(workload), _container(workload)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert {"type": "RuntimeDefault"} == pod["securityContext"]["seccompProfile"]
    expected = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert expected == container["securityContext"]
    assert pod["automountServiceAccountToken"] is False
    assert {"cpu", "memory"} == set(container["resources"]["requests"])
    assert "memory" in container["resources"]["limits"]


def test_names_of_the_service_in_the_environment_are_no_settings() -> None:
    """Rule: Kubernetes describes each Service in the pods' environment; none of that is a setting of ours."""
    name = SERVICE["metadata"]["name"].upper().replace("-", "_")
    links = {f"{name}_SERVICE_HOST", f"{name}_SERVICE_PORT", f"{name}_PORT"}
    for port in SERVICE["spec"]["ports"]:
        links |= {f"{name}_SERVICE_PORT_{port['name'].upper()}", f"{name}_PORT_{port['port']}_TCP"}
        links |= {f"{name}_PORT_{port['port']}_TCP_{part}" for part in ("ADDR", "PORT", "PROTO")}
    assert set() == links & VARIABLES
    assert not any(_pod(workload)["enableServiceLinks"] for workload in WORKLOADS.values())


def test_selectors_find_the_servers_and_nothing_else() -> None:
    """Rule: Service, budget, policy and spread select the Deployment's pods, never the migration's."""
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    selectors = [
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        SERVICE["spec"]["selector"],
        read_yaml(KUBERNETES / "pod-disruption-budget.yaml")["spec"]["selector"]["matchLabels"],
        read_yaml(KUBERNETES / "network-policy.yaml")["spec"]["podSelector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in _pod(DEPLOYMENT)["topologySpreadConstraints"]),
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= JOB["spec"]["template"]["metadata"]["labels"].items()
    monitor = read_yaml(KUBERNETES / "service-monitor.yaml")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= SERVICE["metadata"]["labels"].items()
    assert {endpoint["port"] for endpoint in monitor["endpoints"]} <= {
        port["name"] for port in SERVICE["spec"]["ports"]
    }


def test_ports_are_those_that_the_server_listens_on() -> None:
    """Rule: containers, Service and probes mean the same ports, on every address of the pod."""
    container = _container(DEPLOYMENT)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    listens = {"grpc": "SHARDBOOK_LISTEN", "http": "SHARDBOOK_HTTP_LISTEN"}
    assert {name: f"0.0.0.0:{port}" for name, port in ports.items()} == {
        name: _values(DEPLOYMENT)[variable] for name, variable in listens.items()
    }
    for port in SERVICE["spec"]["ports"]:
        assert ports[port["targetPort"]] == port["port"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert {"port": ports["grpc"], "service": PROCESS} == container[probe]["grpc"]
    policy = read_yaml(KUBERNETES / "network-policy.yaml")["spec"]
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == set(ports)


def test_pods_finish_before_they_are_killed() -> None:
    """Rule: the grace period has room for preStop, draining and one last statement."""
    (command, wait_s) = _container(DEPLOYMENT)["lifecycle"]["preStop"]["exec"]["command"]
    assert "sleep" == command
    needed_s = float(wait_s) + drain_s(_values(DEPLOYMENT)) + 30
    assert _pod(DEPLOYMENT)["terminationGracePeriodSeconds"] >= needed_s


def test_a_roll_never_lowers_the_number_of_replicas() -> None:
    """Rule: at least two, one more while rolling, and drained nodes take one at a time."""
    spec = DEPLOYMENT["spec"]
    assert spec["replicas"] >= 2
    assert {"maxSurge": 1, "maxUnavailable": 0} == spec["strategy"]["rollingUpdate"]
    assert 1 == read_yaml(KUBERNETES / "pod-disruption-budget.yaml")["spec"]["maxUnavailable"]
    assert "Never" == _pod(JOB)["restartPolicy"]


def test_service_has_one_address_of_its_own() -> None:
    """Rule: clients reconnect to an address that stays; the manifest says why."""
    assert "ClusterIP" == SERVICE["spec"]["type"]
    assert "clusterIP" not in SERVICE["spec"]
