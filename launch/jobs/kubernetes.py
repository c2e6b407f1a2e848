"""Manifests: a Kubeflow TrainJob, or a JobSet where the cluster has no Kubeflow. Secrets are named, never written.

Source: the public CRDs trainer.kubeflow.org/v1alpha1 TrainJob and jobset.x-k8s.io/v1alpha2 JobSet.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from .job import Job, Kubernetes, dns_name
from .torchrun import AGENT, ENVIRONMENT, MODULE, torchrun_command

WORK = "/workspace"
"""Where the volume is mounted: runs, cache and the recipe, if it is a file."""
PORT = 29500
Kind = Literal["trainjob", "jobset"]


def manifest(job: Job, cluster: Kubernetes, kind: Kind = "trainjob") -> str:
    """The manifest as YAML, for ``kubectl apply -f -``."""
    import yaml

    made = train_job(job, cluster) if kind == "trainjob" else job_set(job, cluster)
    return yaml.safe_dump(made, sort_keys=False, width=1000)


def train_job(job: Job, cluster: Kubernetes) -> dict[str, Any]:
    """A TrainJob on the runtime ``torch-distributed``, whose environment tells torchrun its nodes and where they meet.

    The time that a stopped pod has to save is the runtime's to set: a TrainJob cannot (terminationGracePeriodSeconds is no override).
    """
    name = dns_name(job.job_id)
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name, "namespace": cluster.namespace, "labels": {"app.kubernetes.io/name": "decoct"}},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": "torch-distributed"},
            "trainer": {
                "image": cluster.image,
                "numNodes": job.nodes,
                "numProcPerNode": job.gpus,
                # torchrun's arguments about nodes and rendezvous come from the runtime's environment (PET_*)
                "command": ["python", "-m", AGENT],
                "args": _literal(["--max-restarts", str(job.restarts), "-m", MODULE, *job.arguments()]),
                "env": _environment(cluster),
                "resourcesPerNode": {"limits": {"nvidia.com/gpu": job.gpus}},
            },
            "podTemplateOverrides": [
                {
                    "targetJobs": [{"name": "node"}],
                    "spec": {
                        "containers": [{"name": "node", "volumeMounts": _mounts()}],
                        "volumes": _volumes(cluster),
                    },
                }
            ],
        },
    }


def job_set(job: Job, cluster: Kubernetes) -> dict[str, Any]:
    """A JobSet of one indexed Job: a pod a node, which meet at the first pod."""
    name = dns_name(job.job_id)
    head = f"{name}-node-0-0.{name}"
    command = torchrun_command(replace(job, job_id=name), endpoint=f"{head}:{PORT}", python="python")
    container = {
        "name": "node",
        "image": cluster.image,
        "workingDir": WORK,
        "command": _literal(command),
        "env": _environment(cluster),
        "resources": {"limits": {"nvidia.com/gpu": job.gpus}},
        "volumeMounts": _mounts(),
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        "containers": [container],
        "volumes": _volumes(cluster),
    }
    replicated = {
        "name": "node",
        "replicas": 1,
        "template": {
            "spec": {
                "completions": job.nodes,
                "parallelism": job.nodes,
                "completionMode": "Indexed",
                "backoffLimit": job.restarts * job.nodes,
                "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": _decided("node")}]},
                "template": {"spec": pod},
            }
        },
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "namespace": cluster.namespace, "labels": {"app.kubernetes.io/name": "decoct"}},
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {
                "maxRestarts": job.restarts,
                "rules": [{"name": "decided", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [replicated],
        },
    }


def _literal(words: Sequence[str]) -> list[str]:
    """Words as a container gets them: Kubernetes fills in $(NAME) of its own, and takes $$ for $."""
    return [word.replace("$", "$$") for word in words]


def _decided(container: str) -> dict[str, Any]:
    """Exit codes that another start would only repeat: a mistake and a failed gate."""
    return {"containerName": container, "operator": "In", "values": [2, 3]}


def _environment(cluster: Kubernetes) -> list[dict[str, Any]]:
    plain = {**ENVIRONMENT, "DECOCT_CACHE": f"{WORK}/.cache/decoct", "HF_HOME": f"{WORK}/.cache/huggingface"}
    found: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in plain.items()]
    for variable, reference in cluster.secrets.items():
        secret, _, key = reference.partition("/")
        found.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return found


def _mounts() -> list[dict[str, Any]]:
    return [{"name": "work", "mountPath": WORK}, {"name": "shm", "mountPath": "/dev/shm"}]


def _volumes(cluster: Kubernetes) -> list[dict[str, Any]]:
    # processes of a node talk through shared memory, of which a container has 64 MB by default
    shared = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    return [{"name": "work", "persistentVolumeClaim": {"claimName": cluster.volume_claim}}, shared]
