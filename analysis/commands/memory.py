"""How much memory there is, asked before arrays are made: a refusal in one line, not a machine that stands still."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Bytes that this process may still take: of the machine, its control group and its own limit the smallest.

    None where the system does not say.
    """
    found = [each for each in (_of_the_machine(), _of_the_group(), _of_the_process()) if each is not None]
    return max(min(found), 0) if found else None


def check_memory(nbytes: int, what: str) -> None:
    """Raise MemoryError if there is less memory than that; ``what`` needs it."""
    available = available_bytes()
    if available is not None and nbytes > available:
        raise MemoryError(f"{what} would take {nbytes / 2**30:,.1f} GiB, {available / 2**30:,.1f} GiB are available")


def _of_the_machine() -> int | None:
    try:
        lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, LookupError):
        return None


def _of_the_group() -> int | None:
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # "max": there is none
        return None
    return limit - used


def _of_the_process() -> int | None:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit - used
