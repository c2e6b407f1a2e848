"""The memory of the machine: what a process may still take, and the most that this one has taken."""

import sys
from pathlib import Path

_GROUPS = (
    # files with a container's limit, use and statistics: control groups version 2, then version 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be taken without swapping: the system's available memory, or less if a container has a limit.

    File caches count as free memory. None if the system does not report it (all but Linux).
    """
    # MemAvailable and not MemFree: the kernel's own estimate contains caches that it would give up
    rooms = [_number(proc / "meminfo", "MemAvailable:", 1024)]
    rooms += [_room(*(groups / name for name in names)) for names in _GROUPS]
    return min((room for room in rooms if room is not None), default=None)


def peak_bytes(proc: Path = Path("/proc")) -> int | None:
    """The most memory that this process has held so far; None if the system does not report it."""
    # VmHWM, since the figure of getrusage includes that of the parent on Linux
    seen = _number(proc / "self" / "status", "VmHWM:", 1024)
    if seen is not None:
        return seen
    try:
        import resource
    except ImportError:  # Windows
        return None
    # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _room(limit: Path, used: Path, stat: Path) -> int | None:
    """The memory that a control group leaves; None if it sets no limit."""
    try:
        free = int(limit.read_text()) - int(used.read_text())
    except (OSError, ValueError):  # no such group, or the word 'max'
        return None
    # a group's use contains file caches, which are given up when memory is needed
    return max(0, free + (_number(stat, "inactive_file", 1) or 0))


def _number(file: Path, key: str, unit: int) -> int | None:
    """The number of a key in a file of ``key number`` lines."""
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    return next((int(line[1]) * unit for line in lines if line and line[0] == key), None)
