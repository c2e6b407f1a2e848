"""How much memory of the machine a process may still take."""

from pathlib import Path

_GROUPS = (
    # limit, use and a breakdown of a container: control groups version 2, then version 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be taken without swapping: what the system has to give, or less where a container has a limit.

    Memory that only keeps files at hand counts as free. None where the system does not tell (anything but Linux).
    """
    rooms = [_number(proc / "meminfo", "MemAvailable:", 1024)]
    rooms += [_room(*(groups / name for name in names)) for names in _GROUPS]
    return min((room for room in rooms if room is not None), default=None)


def _room(limit: Path, used: Path, stat: Path) -> int | None:
    """What a control group leaves; None where it sets no limit."""
    try:
        free = int(limit.read_text()) - int(used.read_text())
    except (OSError, ValueError):  # no such group, or the word 'max'
        return None
    return max(0, free + (_number(stat, "inactive_file", 1) or 0))


def _number(file: Path, key: str, unit: int) -> int | None:
    """The number behind a key of a file of ``key number`` lines."""
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    return next((int(line[1]) * unit for line in lines if line and line[0] == key), None)
