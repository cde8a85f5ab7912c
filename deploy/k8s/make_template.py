"""Write ``base-job-template.json``: Prefect's template of a Kubernetes job, with a GPU, /dev/shm and our volumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect_kubernetes.worker import KubernetesWorker

TEMPLATE = Path(__file__).with_name("base-job-template.json")
CLAIMS = ("cache", "models", "data", "output")
USER_ID = 10001  # of the image


def build_template() -> dict[str, Any]:
    """Return the base job template of the work pool ``gpu-kubernetes``."""
    template = KubernetesWorker.get_default_base_job_template()
    properties = template["variables"]["properties"]
    properties["image"]["default"] = "diffsynth-pipe:latest"
    properties |= {
        "gpu_count": {"title": "GPUs", "type": "integer", "default": 1, "minimum": 1},
        "shm_size": {"title": "Size of /dev/shm", "type": "string", "default": "8Gi"},
        "node_selector": {
            "title": "Labels of the nodes to use",
            "type": "object",
            "default": {},
            "additionalProperties": {"type": "string"},
        },
        "termination_grace_seconds": {
            "title": "Seconds that a stopped training may take to save",
            "type": "integer",
            "default": 180,  # more than launch.GUARD_GRACE_S
        },
    }
    job = template["job_configuration"]["job_manifest"]["spec"]
    pod = job["template"]["spec"]
    for name in ("completions", "parallelism"):  # the job's fields, which Prefect puts into the pod's
        job[name] = pod.pop(name)
    container = pod["containers"][0]
    container["resources"]["limits"]["nvidia.com/gpu"] = "{{ gpu_count }}"
    container["volumeMounts"] = [
        *({"name": name, "mountPath": f"/{name}"} for name in CLAIMS),
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - a mount point
    ]
    container["securityContext"] = {"allowPrivilegeEscalation": False}
    pod["volumes"] = [
        *({"name": name, "persistentVolumeClaim": {"claimName": f"diffsynth-pipe-{name}"}} for name in CLAIMS),
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "{{ shm_size }}"}},
    ]
    pod["securityContext"] = {"runAsNonRoot": True, "runAsUser": USER_ID, "fsGroup": USER_ID}
    pod["nodeSelector"] = "{{ node_selector }}"
    pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    pod["terminationGracePeriodSeconds"] = "{{ termination_grace_seconds }}"
    return template


def text() -> str:
    """Return the file's text."""
    return json.dumps(build_template(), indent=2) + "\n"


if __name__ == "__main__":
    TEMPLATE.write_text(text(), encoding="utf-8")
