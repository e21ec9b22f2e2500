"""A LeaderWorkerSet: one pod for each node, started and restarted together; torchrun in every pod.

The controller gives each pod LWS_LEADER_ADDRESS, LWS_GROUP_SIZE and LWS_WORKER_INDEX. The plan travels in a ConfigMap.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml

from soloist.launchers.start import SERVER_PORT, Start

NAME = "soloist"  # of everything in the cluster
PLAN_FILE = "/etc/soloist/plan.json"  # in the pods
MODELS = "/models"
IMAGE = "<image with soloist[serve]>"
CLAIM = "<claim that holds the model>"


def manifest(start: Start, plan_text: str) -> str:
    """YAML of the ConfigMap, the LeaderWorkerSet and the Service of its leader."""
    labels = {"app": NAME}
    compact = json.dumps(json.loads(plan_text), separators=(",", ":"))
    documents = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{NAME}-plan"},
            "data": {"plan.json": compact},
        },
        {
            "apiVersion": "leaderworkerset.x-k8s.io/v1",
            "kind": "LeaderWorkerSet",
            "metadata": {"name": NAME, "labels": labels},
            "spec": {
                "replicas": 1,
                "startupPolicy": "LeaderCreated",
                "leaderWorkerTemplate": {
                    "size": start.nodes,
                    "restartPolicy": "RecreateGroupOnPodRestart",
                    "leaderTemplate": _pod(start, {**labels, "role": "leader"}, leader=True),
                    "workerTemplate": _pod(start, labels, leader=False),
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": NAME, "labels": labels},
            "spec": {
                "selector": {**labels, "role": "leader"},
                "ports": [{"name": "http", "port": SERVER_PORT, "targetPort": SERVER_PORT}],
            },
        },
    ]
    head = "# Replace what stands in <…>, then: kubectl apply -f <this>. Needs the LeaderWorkerSet controller.\n"
    return head + yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=1000)


class _Plain(yaml.SafeDumper):
    """Repeats what occurs twice instead of referring to it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _pod(start: Start, labels: dict[str, str], leader: bool) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": NAME,
        "image": IMAGE,
        "command": ["bash", "-c", _command(start)],
        "env": [{"name": n, "value": v} for n, v, _ in start.variables if not v.startswith("<")],
        "resources": {"limits": {"nvidia.com/gpu": start.ranks_per_node}},
        "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},  # RDMA locks memory
        "volumeMounts": [
            {"name": "plan", "mountPath": "/etc/soloist", "readOnly": True},
            {"name": "models", "mountPath": MODELS, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if leader:
        container["ports"] = [{"containerPort": SERVER_PORT}]
        container["readinessProbe"] = {"httpGet": {"path": "/health", "port": SERVER_PORT}, "periodSeconds": 10}
    volumes: list[dict[str, Any]] = [
        {"name": "plan", "configMap": {"name": f"{NAME}-plan"}},
        {"name": "models", "persistentVolumeClaim": {"claimName": CLAIM, "readOnly": True}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    return {"metadata": {"labels": labels}, "spec": {"containers": [container], "volumes": volumes}}


def _command(start: Start) -> str:
    """A server in a pod is reached at the pod's address, not at its localhost."""
    arguments = [*start.arguments]
    if arguments[0] == "serve" and "--host" not in arguments:
        arguments += ["--host", "0.0.0.0", "--port", str(SERVER_PORT)]
    return (
        f'exec torchrun --nnodes "$LWS_GROUP_SIZE" --nproc-per-node {start.ranks_per_node} '
        f'--node-rank "$LWS_WORKER_INDEX" --master-addr "$LWS_LEADER_ADDRESS" --master-port {start.master_port} '
        f"-m soloist {shlex.join(arguments)}"
    )
