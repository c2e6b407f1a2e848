"""Manifests: a Kubeflow TrainJob, or a JobSet where the cluster has no Kubeflow. Secrets are referenced, never written.

Source: the public CRDs trainer.kubeflow.org/v1alpha1 TrainJob and jobset.x-k8s.io/v1alpha2 JobSet.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from .job import Job, Kubernetes, dns_name
from .torchrun import AGENT, ENVIRONMENT, MODULE, torchrun_command

WORK = "/workspace"
"""Mount point of the volume with runs, cache and the recipe, if it is a file."""
PORT = 29500
Kind = Literal["trainjob", "jobset"]


def manifest(job: Job, cluster: Kubernetes, kind: Kind = "trainjob") -> str:
    """Return the manifest as YAML, for ``kubectl apply -f -``."""
    import yaml

    made = train_job(job, cluster) if kind == "trainjob" else job_set(job, cluster)
    # one line per value: YAML would otherwise break a long argument at its spaces
    return yaml.safe_dump(made, sort_keys=False, width=1000)


def train_job(job: Job, cluster: Kubernetes) -> dict[str, Any]:
    """Return a TrainJob on the runtime ``torch-distributed``, whose environment gives torchrun its nodes and rendezvous.

    Only the runtime can set the time that a stopped pod has to save: a TrainJob cannot override terminationGracePeriodSeconds.
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
    """Return a JobSet of one indexed Job with one pod per node; the first pod is the rendezvous."""
    name = dns_name(job.job_id)
    # JobSet's name for the first pod: <jobset>-<job>-<job index>-<pod index>.<service>, the service being called like the JobSet
    head = f"{name}-node-0-0.{name}"
    # one name for the JobSet and for its rendezvous
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
        # the Job restarts failed pods, so that its failure policy sees the exit code
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
                # pods of an indexed Job have stable host names; without them the rendezvous would have no address
                "completionMode": "Indexed",
                # counted over all pods of the Job, so that each node gets its restarts
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
                # a user error or failed gate ends the Job by its pod failure policy; the JobSet must not start it again
                "rules": [{"name": "decided", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [replicated],
        },
    }


def _literal(words: Sequence[str]) -> list[str]:
    """Escape words for a container's command: Kubernetes expands $(NAME), and reads $$ as $."""
    return [word.replace("$", "$$") for word in words]


def _decided(container: str) -> dict[str, Any]:
    """Return the rule for exit codes that a restart would only repeat: a user error (2) and a failed gate (3)."""
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
    # processes of a node communicate through shared memory, of which a container has only 64 MB by default
    shared = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    return [{"name": "work", "persistentVolumeClaim": {"claimName": cluster.volume_claim}}, shared]
