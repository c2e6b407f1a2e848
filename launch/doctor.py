"""`decoct doctor`: what is installed, what devices there are, which combinations are known to be bad, and what each verb lacks."""

import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "triton", "lightning", "transformers", "tokenizers", "safetensors", "datasets", "bitsandbytes", "wandb", "pydantic",
    "compressed-tensors", "matplotlib", "numpy",
)  # fmt: skip
_NEEDED: dict[str, tuple[str, ...]] = {
    "run": ("torch", "lightning", "transformers", "pydantic"),
    "a hub dataset": ("datasets",),
    "parquet files": ("pyarrow",),
    "adamw-8bit, nf4 and int8 teachers": ("bitsandbytes",),
    "logger: wandb": ("wandb",),
    "Triton kernels": ("triton",),
    "verify against transformers": ("compressed_tensors",),
}
_TOOLS = {"launch --target slurm": "sbatch", "launch --target kubernetes": "kubectl", "trainer.compile": "c++"}


@dataclass(frozen=True)
class Finding:
    """A combination that is known to be bad."""

    what: str
    remedy: str
    fatal: bool
    """Whether decoct should not be used with it."""


@dataclass(frozen=True)
class Health:
    """Everything doctor knows."""

    versions: dict[str, str | None]
    machine: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """What cannot be done -> what is missing for it."""

    @property
    def usable(self) -> bool:
        """Whether nothing fatal was found."""
        return not any(finding.fatal for finding in self.findings)


Versions = Mapping[str, str | None]


def _release(versions: Versions, package: str) -> tuple[int, ...] | None:
    """(2, 13, 0) of '2.13.0+cpu'; None when it is not installed."""
    text = versions.get(package)
    if text is None:
        return None
    numbers = []
    for part in text.partition("+")[0].split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits) if digits else 0)
    return tuple(numbers)


def _stolen_credentials(versions: Versions) -> Finding | None:
    if _release(versions, "lightning") in ((2, 6, 2), (2, 6, 3)):
        return Finding(f"lightning {versions['lightning']} was published with code that steals credentials", "install 2.6.6 or newer", True)
    return None


def _lightning_holes(versions: Versions) -> Finding | None:
    found = _release(versions, "lightning")
    if found and found < (2, 6, 6):
        return Finding(f"lightning {versions['lightning']} runs code from checkpoints (CVE-2026-58659)", "install 2.6.6 or newer", True)
    return None


def _unpickler(versions: Versions) -> Finding | None:
    found = _release(versions, "torch")
    if found and found < (2, 10):
        return Finding(f"torch {versions['torch']} can be taken over by a checkpoint (CVE-2026-24747)", "install 2.11 or newer", True)
    return None


def _old_torch(versions: Versions) -> Finding | None:
    found = _release(versions, "torch")
    if found and (2, 10) <= found < (2, 11):
        return Finding(f"torch {versions['torch']} is older than any that decoct was tested with", "install 2.11 to 2.13", False)
    return None


def _old_transformers(versions: Versions) -> Finding | None:
    found = _release(versions, "transformers")
    if found and found < (5,):
        return Finding(f"transformers {versions['transformers']} has another interface", "install 5.17 or newer", True)
    return None


def _foreign_triton(versions: Versions) -> Finding | None:
    """torch pins one release of triton; another one compiles kernels that torch does not expect."""
    pinned: dict[tuple[int, ...], tuple[int, int]] = {(2, 11): (3, 6), (2, 12): (3, 7), (2, 13): (3, 7)}
    torch, triton = _release(versions, "torch"), _release(versions, "triton")
    wanted = pinned.get(torch[:2]) if torch else None
    if wanted and triton and triton[:2] != wanted:
        wish = ".".join(map(str, wanted))
        return Finding(f"triton {versions['triton']} is not the one that torch {versions['torch']} wants", f"install triton {wish}", False)
    return None


def _python(versions: Versions) -> Finding | None:
    found = _release(versions, "python")
    if found and not (3, 11) <= found[:2] < (3, 14):
        return Finding(f"Python {versions['python']} is outside 3.11 to 3.13", "use one of these", True)
    return None


KNOWN_BAD: tuple[Callable[[Versions], Finding | None], ...] = (
    _stolen_credentials, _lightning_holes, _unpickler, _old_torch, _old_transformers, _foreign_triton, _python,
)  # fmt: skip
"""Rules over installed versions; the first word on each combination is the maintainers' own advisory or release note."""


def installed() -> dict[str, str | None]:
    """Version of Python and of every package that matters; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("decoct", *PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def judge(versions: Versions) -> list[Finding]:
    """What is known to be bad about these versions."""
    return [finding for rule in KNOWN_BAD if (finding := rule(versions))]


def missing() -> dict[str, str]:
    """What cannot be done here, and what is missing for it."""
    found: dict[str, str] = {}
    for what, modules in _NEEDED.items():
        if absent := [module for module in modules if importlib.util.find_spec(module) is None]:
            found[what] = f"pip install {' '.join(absent)}"
    found |= {what: f"{tool} is not on the PATH" for what, tool in _TOOLS.items() if shutil.which(tool) is None}
    return found


def examine() -> Health:
    """Look at everything; no network, no model."""
    versions = installed()
    machine, findings = _machine()
    return Health(versions, machine, judge(versions) + findings, missing())


def _machine() -> tuple[dict[str, Any], list[Finding]]:
    import torch

    from ..trainer.cache import cache_dir

    findings: list[Finding] = []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append({"name": properties.name, "memory": properties.total_memory, "capability": f"{properties.major}.{properties.minor}"})
        if properties.major < 8:
            findings.append(Finding(f"{properties.name} has no bf16", "set trainer.precision: 32", False))
    cache = cache_dir()
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
    if gpus and machine["shared memory"] is not None and machine["shared memory"] < 2**30:
        findings.append(Finding("/dev/shm has less than 1 GB", "start the container with more (--shm-size=8g)", False))
    return machine, findings


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def run_doctor(as_json: bool) -> None:
    """Print what was found; exit code 2 when something fatal is among it."""
    health = examine()
    if as_json:
        print(json.dumps({**asdict(health), "usable": health.usable}, indent=1))
    else:
        _draw(health)
    if not health.usable:
        raise SystemExit(2)


def _draw(health: Health) -> None:
    from rich.console import Console
    from rich.table import Table

    from .plan.show import size

    console = Console()
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
