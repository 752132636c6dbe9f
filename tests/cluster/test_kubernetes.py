"""Kubernetes files: the fields of KubeRay v1.7.0 that they rely on, and what KubeRay and Kueue demand of them."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray._private.label_utils import validate_node_label_syntax

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
RAY_VERSION = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]


def read(name: str) -> Any:
    return yaml.safe_load((KUBERAY / name).read_text())


def read_all(name: str) -> dict[str, Any]:
    """Objects of a file by their kind."""
    return {item["kind"]: item for item in yaml.safe_load_all((KUBERAY / name).read_text())}


# What KubeRay v1.7.0's RayCluster and RayJob (ray.io/v1) and Kubernetes itself call the fields that the
# files rely on. A name is a field; its value a type, a further mapping of fields, or a list of one of these.

RESOURCES = {"requests": {str: str}, "limits": {str: str}}
CONTAINER_SECURITY = {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}}
NODE_TERM = {"matchExpressions": [{"key": str, "operator": str, "values": [str]}]}
POD_SPEC = {
    "serviceAccountName": str,
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "fsGroup": int, "seccompProfile": {"type": str}},
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [NODE_TERM]},
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": int, "preference": NODE_TERM}],
        }
    },
    "tolerations": [{"key": str, "operator": str, "effect": str}],
    "containers": [
        {
            "name": str,
            "image": str,
            "env": [{"name": str, "value": str}],
            "ports": [{"name": str, "containerPort": int}],
            "lifecycle": {"preStop": {"exec": {"command": [str]}}},
            "securityContext": CONTAINER_SECURITY,
            "resources": RESOURCES,
        }
    ],
}
TEMPLATE = {"metadata": {"labels": {str: str}}, "spec": POD_SPEC}
RAY_CLUSTER_SPEC = {
    "rayVersion": str,
    "authOptions": {"mode": str, "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": str,
        "upscalingMode": str,
        "idleTimeoutSeconds": int,
        "resources": RESOURCES,
        "securityContext": CONTAINER_SECURITY,
    },
    "headGroupSpec": {
        "serviceType": str,
        "enableIngress": bool,
        "rayStartParams": {str: str},
        "template": TEMPLATE,
    },
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": {str: str},
            "labels": {str: str},
            "template": TEMPLATE,
        }
    ],
}
META = {"name": str, "labels": {str: str}, "annotations": {str: str}}
RAY_CLUSTER = {"apiVersion": str, "kind": str, "metadata": META, "spec": RAY_CLUSTER_SPEC}
RAY_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": META,
    "spec": {
        "entrypoint": str,
        "submissionMode": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "rayClusterSpec": RAY_CLUSTER_SPEC,
    },
}


def faults(found: Any, allowed: Any, path: str = "") -> Iterator[str]:
    """What does not fit, by its path."""
    if isinstance(allowed, list):
        if not isinstance(found, list):
            yield f"{path}: no list"
            return
        for index, item in enumerate(found):
            yield from faults(item, allowed[0], f"{path}[{index}]")
    elif isinstance(allowed, dict):
        if not isinstance(found, dict):
            yield f"{path}: no mapping"
            return
        for key, value in found.items():
            if str in allowed:
                yield from faults(value, allowed[str], f"{path}.{key}")
            elif key in allowed:
                yield from faults(value, allowed[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}: unknown"
    elif type(found) is not allowed:
        yield f"{path}: no {allowed.__name__}"


def test_fields_are_those_of_kuberay() -> None:
    assert list(faults(read("raycluster.yaml"), RAY_CLUSTER)) == []
    assert list(faults(read("rayjob.yaml"), RAY_JOB)) == []


def test_wrong_fields_would_be_found() -> None:
    job = read("rayjob.yaml")
    job["spec"]["shutdownAfterJobFinish"] = True
    job["spec"]["backoffLimit"] = "2"
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["minReplica"] = 1
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"] = {}
    assert list(faults(job, RAY_JOB)) == [
        ".spec.backoffLimit: no int",
        ".spec.rayClusterSpec.headGroupSpec.template.spec.containers[0].env: no list",
        ".spec.rayClusterSpec.workerGroupSpecs[1].minReplica: unknown",
        ".spec.shutdownAfterJobFinish: unknown",
    ]


@pytest.fixture
def spec() -> dict[str, Any]:
    found: dict[str, Any] = read("raycluster.yaml")["spec"]
    return found


def pods(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod templates by the name of their group."""
    groups = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"], **groups}


def test_job_and_cluster_are_the_same(spec: dict[str, Any]) -> None:
    job, cluster = read("rayjob.yaml"), read("raycluster.yaml")
    assert job["spec"]["rayClusterSpec"] == spec
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    for item in (job, cluster):  # the operator refuses longer names, and others than these
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", item["metadata"]["name"])


def test_has_token_authentication_from_a_secret(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token", "secretName": "oml-ray-auth"}
    assert spec["rayVersion"] == RAY_VERSION == ray.__version__
    for template in pods(spec).values():
        (container,) = template["spec"]["containers"]
        assert container["env"] == [{"name": "RAY_AUTH_MODE", "value": "token"}]


def test_dashboard_stays_in_the_cluster(spec: dict[str, Any]) -> None:
    head = spec["headGroupSpec"]
    assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
    policy = read_all("prerequisites.yaml")["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    selected = policy["podSelector"]["matchLabels"]
    for template in pods(spec).values():
        assert selected.items() <= template["metadata"]["labels"].items()
    own, dashboard = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": selected}}]}
    assert dashboard["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert all("podSelector" in peer for peer in dashboard["from"])  # none from outside


def test_pods_have_no_privileges(spec: dict[str, Any]) -> None:
    account = read_all("prerequisites.yaml")["ServiceAccount"]["metadata"]["name"]
    for template in pods(spec).values():
        pod = template["spec"]
        (container,) = pod["containers"]
        assert pod["serviceAccountName"] == account
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["image"] == f"oml-ray:{VERSION}"
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_has_workers_of_each_kind(spec: dict[str, Any]) -> None:
    groups = spec["workerGroupSpecs"]
    assert [group["labels"]["oml-ray/role"] for group in groups] == ["train", "decode", "gallery"]
    for group in groups:
        validate_node_label_syntax(group["labels"])
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "labels" not in group["rayStartParams"]  # the operator refuses both
    gpus = [
        pods(spec)[name]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for name in pods(spec)
    ]
    assert gpus == [None, "4", None, None]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_autoscales_with_version_2(spec: dict[str, Any]) -> None:
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert {template["spec"]["restartPolicy"] for template in pods(spec).values()} == {"Never"}  # v2 demands it


def test_spot_pods_are_drained_in_time(spec: dict[str, Any]) -> None:
    found = pods(spec)
    kept_off = found["head"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = kept_off["nodeSelectorTerms"]
    never = {(rule["key"], *rule["values"]) for rule in term["matchExpressions"] if rule["operator"] == "NotIn"}
    for name in ("gpu", "decode"):
        rules = found[name]["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        terms = [rule["preference"]["matchExpressions"][0] for rule in rules]
        assert {(rule["key"], *rule["values"]) for rule in terms if rule["operator"] == "In"} == never
    for name in ("gpu", "decode", "gallery"):
        pod = found[name]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "/home/ray/oml_ray/cluster/preemption.py", "now"]
        assert command[3] == "--seconds"
        assert int(command[4]) < pod["terminationGracePeriodSeconds"]


def quantity(text: str) -> float:
    units = {"m": 1e-3, "Gi": 2**30, "Ti": 2**40}
    number, unit = re.fullmatch(r"(\d+)([a-zA-Z]*)", text).groups()  # type: ignore[union-attr]
    return int(number) * units.get(unit, 1)


def test_job_is_queued_by_kueue() -> None:
    job, queues = read("rayjob.yaml"), read_all("queue.yaml")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queues["LocalQueue"]["metadata"]["name"]
    assert queues["LocalQueue"]["spec"]["clusterQueue"] == queues["ClusterQueue"]["metadata"]["name"]
    # Kueue's conditions: autoscaling only of elastic jobs, a cluster that goes with its job, at most seven groups.
    assert job["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert len(job["spec"]["rayClusterSpec"]["workerGroupSpecs"]) <= 7
    (group,) = queues["ClusterQueue"]["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == queues["ResourceFlavor"]["metadata"]["name"]
    quota = {item["name"]: quantity(item["nominalQuota"]) for item in flavor["resources"]}
    assert set(quota) == set(group["coveredResources"])
    cluster = job["spec"]["rayClusterSpec"]
    counts = {"head": 1, **{group["groupName"]: group["replicas"] for group in cluster["workerGroupSpecs"]}}
    wanted: dict[str, float] = {}
    for name, template in pods(cluster).items():
        for resource, text in template["spec"]["containers"][0]["resources"]["requests"].items():
            wanted[resource] = wanted.get(resource, 0) + counts[name] * quantity(text)
    assert set(wanted) <= set(quota)
    assert all(wanted[resource] <= quota[resource] for resource in wanted)


def test_job_runs_what_is_in_the_image() -> None:
    words = shlex.split(read("rayjob.yaml")["spec"]["entrypoint"])
    image = "/home/ray/oml_ray/"
    assert words[0] == "python"
    assert [word.startswith(image) for word in words[1:3]] == [True, True]
    assert all((ROOT / word.removeprefix(image)).is_file() for word in words[1:3])
    assert "run.storage=s3://my-bucket/runs" in words
