"""What is launched: the job and the settings of Slurm and Kubernetes."""

import re
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...models.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Job:
    """One recipe on ``nodes`` machines of ``gpus`` processes."""

    recipe: str
    """Recipe file or shipped name, as given."""
    name: str
    """The recipe's name, from which the job's name is made."""
    overrides: Sequence[str] = ()
    out: Path
    """Run folder, shared by the machines."""
    gpus: int = 1
    """Processes per node, one per GPU."""
    nodes: int = 1
    restarts: int = 3
    """Number of restarts after a process dies; every start resumes by itself."""
    job_id: str
    """Rendezvous id, unique to the job and the same on all its nodes."""
    grace: int = 120
    """Seconds between the stop signal and the end, for saving a checkpoint."""

    def __post_init__(self) -> None:
        words = {"the recipe": self.recipe, "its name": self.name, "--out": str(self.out), "--job-id": self.job_id}
        words |= {"an override": " ".join(self.overrides)}
        for what, text in words.items():
            check_word(what, text)
            # also where the shell quotes correctly: quoting does not change what a program makes of a dash
            if text.startswith("-"):
                raise UserError(f"{what} {text!r} begins with '-', which programs take for an option; choose another name, or a whole path")

    def arguments(self) -> list[str]:
        """Return the arguments of ``decoct``."""
        return ["run", self.recipe, *self.overrides, f"trainer.devices={self.gpus}", "--out", str(self.out)]

    @property
    def logs(self) -> Path:
        """Return the folder of the ranks' log files."""
        return self.out / "logs"


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Settings of Slurm."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    """Time limit in sbatch's syntax: minutes, 24:00:00, 2-12 or 2-12:30:00."""

    def __post_init__(self) -> None:
        for option, text in (("--partition", self.partition), ("--account", self.account)):
            check_word(option, text or "")
        if self.time is not None and not re.fullmatch(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}", self.time):
            raise UserError(f"--time={self.time} is no time limit of Slurm's; write minutes, HH:MM:SS or DAYS-HH:MM:SS, such as 24:00:00")


@dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """Settings of the Kubernetes cluster."""

    image: str
    namespace: str = "default"
    volume_claim: str
    """PersistentVolumeClaim for runs and cache."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Environment variable -> 'secret/key' with its value."""

    def __post_init__(self) -> None:
        check_word("--image", self.image)
        for option, name in (("--namespace", self.namespace), ("--volume-claim", self.volume_claim)):
            if not _CLUSTER_NAME.fullmatch(name):
                raise UserError(f"{option}={name!r} cannot name anything in a cluster; use a-z, 0-9, '-' and '.', at most 253")


_CLUSTER_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def check_word(what: str, text: str) -> None:
    """Raise UserError for a word with line ends, other control characters or broken bytes: in a generated file it would add lines."""
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise UserError(
            f"{what} {text!r} holds a line end or a character that cannot be printed, which no job file can carry; choose another name"
        )


def new_job_id(name: str) -> str:
    """Return a unique job id: the name and eight random hex digits, short enough for the names that a JobSet derives from it."""
    # a Kubernetes label holds 63 characters, and a JobSet appends its job's name and two indices
    return f"{dns_name(name)[:32].rstrip('-')}-{uuid.uuid4().hex[:8]}"


def dns_name(name: str) -> str:
    """Return a valid Kubernetes and host name (RFC 1035): lower case, digits and dashes, a letter first."""
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return found if found[:1].isalpha() else f"decoct-{found}".strip("-")


_SECRET = re.compile(r"[-._a-zA-Z0-9]{1,253}")


def parse_secret(text: str) -> tuple[str, str]:
    """Parse ``WANDB_API_KEY=wandb/key`` into (variable, 'secret/key'); a value instead of a reference is refused."""
    variable, equals, reference = text.partition("=")
    parts = reference.split("/")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable) or len(parts) != 2 or not all(map(_SECRET.fullmatch, parts)):
        raise UserError(
            "--secret takes VARIABLE=SECRET/KEY, a reference to a key of a Kubernetes secret, such as WANDB_API_KEY=wandb/api-key; "
            "values are never written into a manifest"
        )
    return variable, reference
