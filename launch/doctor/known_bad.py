"""Versions and combinations that are known to be bad, each with its source: the rules of `decoct doctor`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A combination that is known to be bad."""

    what: str
    remedy: str
    fatal: bool
    """Whether decoct must not be used with it."""


Versions = Mapping[str, str | None]


def _release(versions: Versions, package: str) -> tuple[int, ...] | None:
    """Return a version as numbers, '2.13.0+cpu' as (2, 13, 0); None if the package is not installed."""
    text = versions.get(package)
    if text is None:
        return None
    numbers = []
    # without the local part: '+cpu' says how a release was built
    for part in text.partition("+")[0].split(".")[:3]:
        # '0rc1' is read as 1: near enough for the rules, which name releases
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits) if digits else 0)
    return tuple(numbers)


def _stolen_credentials(versions: Versions) -> Finding | None:
    """Lightning-AI/pytorch-lightning#21691."""
    if _release(versions, "lightning") in ((2, 6, 2), (2, 6, 3)):
        return Finding(f"lightning {versions['lightning']} was published with code that steals credentials", "install 2.6.6 or newer", True)
    return None


def _lightning_holes(versions: Versions) -> Finding | None:
    """Lightning-AI/pytorch-lightning#21822 and #21914."""
    found = _release(versions, "lightning")
    if found and found < (2, 6, 6):
        return Finding(f"lightning {versions['lightning']} runs code from checkpoints (CVE-2026-58659)", "install 2.6.6 or newer", True)
    return None


def _unpickler(versions: Versions) -> Finding | None:
    """PyTorch's advisory: memory corruption inside the safe unpickler, fixed in 2.10."""
    found = _release(versions, "torch")
    if found and found < (2, 10):
        return Finding(f"torch {versions['torch']} can be taken over by a checkpoint (CVE-2026-24747)", "install 2.11 or newer", True)
    return None


def _old_torch(versions: Versions) -> Finding | None:
    """decoct's own test matrix."""
    found = _release(versions, "torch")
    if found and (2, 10) <= found < (2, 11):
        return Finding(f"torch {versions['torch']} is older than any that decoct was tested with", "install 2.11 to 2.13", False)
    return None


def _old_transformers(versions: Versions) -> Finding | None:
    """transformers' migration guide to 5: dtypes, tied weights, quantization arguments."""
    found = _release(versions, "transformers")
    if found and found < (5,):
        return Finding(f"transformers {versions['transformers']} has another interface", "install 5.17 or newer", True)
    return None


def _foreign_triton(versions: Versions) -> Finding | None:
    """torch pins one release of triton; another one compiles kernels that torch does not expect."""
    pinned: dict[tuple[int, ...], tuple[int, int]] = {(2, 11): (3, 6), (2, 12): (3, 7), (2, 13): (3, 7)}
    torch, triton = _release(versions, "torch"), _release(versions, "triton")
    # releases of torch that the table does not have are not judged
    wanted = pinned.get(torch[:2]) if torch else None
    if wanted and triton and triton[:2] != wanted:
        wish = ".".join(map(str, wanted))
        return Finding(f"triton {versions['triton']} is not what torch {versions['torch']} needs", f"install triton {wish}", False)
    return None


def _two_lightnings(versions: Versions) -> Finding | None:
    """Lightning-AI/pytorch-lightning#19252: the two packages have separate classes, and different releases do not work together."""
    one, other = versions.get("lightning"), versions.get("pytorch-lightning")
    if one and other and one != other:
        return Finding(f"lightning {one} and pytorch-lightning {other} are both installed", f"install pytorch-lightning {one}", False)
    return None


def _python(versions: Versions) -> Finding | None:
    found = _release(versions, "python")
    if found and not (3, 11) <= found[:2] < (3, 14):
        return Finding(f"Python {versions['python']} is outside 3.11 to 3.13", "use one of these", True)
    return None


KNOWN_BAD: tuple[Callable[[Versions], Finding | None], ...] = (
    _stolen_credentials, _lightning_holes, _unpickler, _old_torch, _old_transformers, _foreign_triton, _two_lightnings, _python,
)  # fmt: skip
"""Rules over installed versions; each is based on the maintainers' own advisory or release note."""


def judge(versions: Versions) -> list[Finding]:
    """Return what is known to be bad about these versions."""
    return [finding for rule in KNOWN_BAD if (finding := rule(versions))]
