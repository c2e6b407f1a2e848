"""The manifests against the schemas of the custom resources, as far as we use them.

Facts from the public API types: kubeflow/trainer ``pkg/apis/trainer/v1alpha1/trainjob_types.go``, kubernetes-sigs/jobset
``api/jobset/v1alpha2/jobset_types.go``, and core/v1, batch/v1 of Kubernetes. Unknown fields are refused, as strict decoding does.
"""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from decoct.launch.jobs.job import Job, Kubernetes, dns_name, new_job_id
from decoct.launch.jobs.kubernetes import job_set, train_job


def _object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required or [], "additionalProperties": False}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
METADATA = _object(["name"], name=NAME, namespace=TEXT, labels={"type": "object", "additionalProperties": TEXT})
REFERENCE = _object(["secretKeyRef"], secretKeyRef=_object(["name", "key"], name=TEXT, key=TEXT))
VARIABLE = {**_object(["name"], name=TEXT, value=TEXT, valueFrom=REFERENCE), "not": {"required": ["value", "valueFrom"]}}
MOUNTS = _list(_object(["name", "mountPath"], name=TEXT, mountPath=TEXT))
VOLUME = _object(
    ["name"],
    name=TEXT,
    persistentVolumeClaim=_object(["claimName"], claimName=TEXT),
    emptyDir=_object(medium={"enum": ["", "Memory"]}),
)
RESOURCES = _object(limits={"type": "object"}, requests={"type": "object"})
CONTAINER = _object(
    ["name", "image"],
    name=TEXT,
    image=TEXT,
    workingDir=TEXT,
    command=_list(TEXT),
    args=_list(TEXT),
    env=_list(VARIABLE),
    resources=RESOURCES,
    volumeMounts=MOUNTS,
)
POD = _object(
    ["containers", "restartPolicy"],
    restartPolicy={"enum": ["OnFailure", "Never"]},
    terminationGracePeriodSeconds=COUNT,
    containers=_list(CONTAINER),
    volumes=_list(VOLUME),
)
BATCH_JOB = _object(
    ["template"],
    completions=COUNT,
    parallelism=COUNT,
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    backoffLimit=COUNT,
    podFailurePolicy=_object(
        ["rules"],
        rules=_list(
            _object(
                ["action"],
                action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
                onExitCodes=_object(
                    ["operator", "values"], containerName=TEXT, operator={"enum": ["In", "NotIn"]}, values=_list({"type": "integer"})
                ),
            )
        ),
    ),
    template=_object(["spec"], spec=POD),
)
JOB_SET = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=METADATA,
    spec=_object(
        ["replicatedJobs"],
        network=_object(enableDNSHostnames={"type": "boolean"}, subdomain=TEXT),
        failurePolicy=_object(
            maxRestarts=COUNT,
            rules=_list(
                _object(
                    ["action"],
                    name=TEXT,
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    onJobFailureReasons=_list(TEXT),
                )
            ),
        ),
        replicatedJobs=_list(_object(["name", "template"], name=NAME, replicas=COUNT, template=_object(["spec"], spec=BATCH_JOB))),
    ),
)
OVERRIDE = _object(
    ["targetJobs"],
    targetJobs=_list(_object(["name"], name=TEXT)),
    spec=_object(volumes=_list(VOLUME), containers=_list(_object(["name"], name=TEXT, env=_list(VARIABLE), volumeMounts=MOUNTS))),
)
TRAIN_JOB = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=METADATA,
    spec=_object(
        ["runtimeRef"],
        runtimeRef=_object(["name"], name=TEXT, apiGroup=TEXT, kind={"enum": ["ClusterTrainingRuntime", "TrainingRuntime"]}),
        trainer=_object(
            image=TEXT,
            command=_list(TEXT),
            args=_list(TEXT),
            env=_list(VARIABLE),
            numNodes=COUNT,
            numProcPerNode={"anyOf": [COUNT, {"enum": ["auto", "cpu", "gpu"]}]},
            resourcesPerNode=RESOURCES,
        ),
        podTemplateOverrides=_list(OVERRIDE),
    ),
)


@pytest.mark.parametrize(("make", "schema"), [(train_job, TRAIN_JOB), (job_set, JOB_SET)], ids=["trainjob", "jobset"])
@pytest.mark.parametrize("name", ["big", "Qwen3_8B.int4", "70b " + "x" * 80])
def test_manifests_fit_the_resources_schemas(make: Any, schema: dict[str, Any], name: str) -> None:
    job = Job(recipe="big.yaml", name=name, out=Path("runs/big"), gpus=8, nodes=2, job_id=new_job_id(name))
    cluster = Kubernetes(image="i", volume_claim="runs", secrets={"HF_TOKEN": "hub/token"})
    made = make(job, cluster)
    jsonschema.validate(made, schema)
    assert len(f"{made['metadata']['name']}-node-0-0-xxxxx") <= 63, "a JobSet's pods are named so"
    broken = make(job, cluster)
    broken["spec"]["grace"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


@pytest.mark.parametrize(("name", "found"), [("Big One", "big-one"), ("70b", "decoct-70b"), ("...", "decoct"), ("a_b.c", "a-b-c")])
def test_names_are_made_valid(name: str, found: str) -> None:
    assert dns_name(name) == found
