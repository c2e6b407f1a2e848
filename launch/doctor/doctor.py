"""`decoct doctor`: installed packages, devices, known bad combinations, and missing requirements of each verb."""

import importlib.util
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..run.installed import installed_version
from .known_bad import Finding, judge

PACKAGES = (
    "torch", "triton", "lightning", "pytorch-lightning", "transformers", "tokenizers", "safetensors", "datasets", "bitsandbytes",
    "wandb", "compressed-tensors", "xllamacpp", "matplotlib", "numpy",
)  # fmt: skip
_NEEDED: dict[str, tuple[str, ...]] = {
    "run": ("torch", "lightning", "transformers"),
    "a hub dataset": ("datasets",),
    "parquet files": ("pyarrow",),
    "adamw-8bit, nf4 and int8 teachers": ("bitsandbytes",),
    "logger: wandb": ("wandb",),
    "logger: tensorboard": ("tensorboard",),
    "logger: mlflow": ("mlflow",),
    "Triton kernels": ("triton",),
    "tasks of lm-eval": ("lm_eval",),
    "verify against transformers": ("compressed_tensors",),
    "verify gguf against llama.cpp": ("xllamacpp",),
    "import GGUF blocks of IQ1 to IQ3": ("gguf",),
}
_TOOLS = {"launch --target slurm": "sbatch", "launch --target kubernetes": "kubectl", "trainer.compile": "c++"}


@dataclass(frozen=True)
class Health:
    """Result of an examination."""

    versions: dict[str, str | None]
    machine: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Unavailable feature -> what it is missing."""

    @property
    def usable(self) -> bool:
        """Return whether nothing fatal was found."""
        return not any(finding.fatal for finding in self.findings)


def installed() -> dict[str, str | None]:
    """Return the versions of Python and of relevant packages; None for a missing package."""
    return {"python": platform.python_version(), **{package: installed_version(package) for package in ("decoct", *PACKAGES)}}


def missing() -> dict[str, str]:
    """Return the features that are unavailable here, and what they are missing."""
    found: dict[str, str] = {}
    for what, modules in _NEEDED.items():
        # looked for, not imported: an import takes seconds, and a broken package would end the examination
        if absent := [module for module in modules if importlib.util.find_spec(module) is None]:
            found[what] = f"pip install {' '.join(absent)}"
    found |= {what: f"{tool} is not on the PATH" for what, tool in _TOOLS.items() if shutil.which(tool) is None}
    return found


def examine() -> Health:
    """Examine packages and machine; uses no network and no model."""
    versions = installed()
    machine, findings = _machine()
    return Health(versions, machine, judge(versions) + findings, missing())


def _machine() -> tuple[dict[str, Any], list[Finding]]:
    import torch

    from ...models.common.cache_folder import cache_dir

    findings: list[Finding] = []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append({"name": properties.name, "memory": properties.total_memory, "capability": f"{properties.major}.{properties.minor}"})
        # bf16 matrix products came with compute capability 8.0 (Ampere)
        if properties.major < 8:
            findings.append(Finding(f"{properties.name} has no bf16", "set trainer.precision: 32", False))
    cache = cache_dir()
    # the cache may not exist yet: its nearest existing parent decides
    place = next(p for p in (cache, *cache.parents) if p.exists())
    if not os.access(place, os.W_OK):
        findings.append(Finding(f"the cache {cache} cannot be written", "set DECOCT_CACHE to a folder that can", True))
    shared = Path("/dev/shm")
    machine = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory": _memory(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        "free here": shutil.disk_usage(".").free,
        "shared memory": shutil.disk_usage(shared).total if shared.is_dir() else None,
        "cache": str(cache),
        "free in the cache": shutil.disk_usage(place).free,
    }
    # NCCL and data loader workers pass data through shared memory; containers have 64 MB by default
    if gpus and machine["shared memory"] is not None and machine["shared memory"] < 2**30:
        findings.append(Finding("/dev/shm has less than 1 GB", "start the container with more (--shm-size=8g)", False))
    return machine, findings


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # not every system has sysconf, or these names in it
    except (OSError, ValueError, AttributeError):
        return None


def run_doctor(as_json: bool) -> None:
    """Print the result; exit code 2 if a finding is fatal."""
    health = examine()
    if as_json:
        print(json.dumps({**asdict(health), "usable": health.usable}, indent=1))
    else:
        _draw(health)
    if not health.usable:
        raise SystemExit(2)


def _draw(health: Health) -> None:
    from rich.table import Table

    from ..plan.units import size
    from ..terminal.console import CleanConsole

    console = CleanConsole()
    table = Table("package", "version", title="versions", title_justify="left")
    for package, version in health.versions.items():
        table.add_row(package, version or "not installed")
    console.print(table)
    for key, value in health.machine.items():
        if key == "gpus":
            for gpu in value:
                console.print(f"GPU: {gpu['name']}, {size(gpu['memory'])}, compute capability {gpu['capability']}", highlight=False)
            if not value:
                console.print("GPU: none; everything runs on the CPU", highlight=False)
        else:
            # counts of cores stay numbers, bytes get a unit
            large = isinstance(value, int) and not isinstance(value, bool) and value > 10**5
            console.print(f"{key}: {size(value) if large else value}", markup=False, highlight=False)
    for what, lacking in health.missing.items():
        console.print(f"not possible here: {what} ({lacking})", style="yellow", markup=False, highlight=False)
    for finding in health.findings:
        style = "bold red" if finding.fatal else "yellow"
        console.print(
            f"{'BAD' if finding.fatal else 'careful'}: {finding.what}; {finding.remedy}", style=style, markup=False, highlight=False
        )
    if not health.findings:
        console.print("nothing known to be bad was found", style="green", highlight=False)
