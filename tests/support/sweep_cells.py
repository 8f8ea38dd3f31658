"""Cells for the tests of analysis.commands.sweep; they note in a log file when they start and end."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any


def note(log: str, *words: object) -> None:
    """Append one line; short appends of several processes do not mix."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(" ".join(map(str, words)) + "\n")


def read_log(log: Path | str) -> list[list[str]]:
    """The words of every line so far."""
    return [line.split() for line in Path(log).read_text(encoding="utf-8").splitlines()] if Path(log).exists() else []


def square(x: float, log: str, seconds: float = 0.0, wait_for: str | None = None) -> dict[str, Any]:
    """x², after some time; notes its process. With ``wait_for`` it ends when that file is there."""
    note(log, "start", x, os.getpid())
    while wait_for is not None and not Path(wait_for).exists():
        time.sleep(0.02)
    time.sleep(seconds)
    note(log, "end", x, os.getpid())
    return {"square": x * x, "pair": (x, x)}


def awkward(what: str, log: str) -> Any:
    """A cell that goes wrong in one of several ways, or right."""
    note(log, "start", what, os.getpid())
    if what == "raise":
        raise ValueError("no such\nrank")
    if what == "exit":
        raise SystemExit(3)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "set":
        return {"x": {1}}
    if what == "list":
        return [1]
    return {"what": what}


def threads() -> dict[str, Any]:
    """How many threads this process's arithmetic really has, asked of OpenBLAS itself and of lance_ref."""
    import numpy as np

    from lance_ref.algebra.kernels import threads as kernels

    matrix = np.ones((300, 300))
    matrix @ matrix
    return {
        "blas": openblas_threads(),
        "kernels": kernels._threads(),
        "setting": os.environ.get("OPENBLAS_NUM_THREADS"),
        "process": os.getpid(),
    }


def openblas_threads() -> int | None:
    """What the OpenBLAS that NumPy has loaded says; None where it cannot be asked."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    for path in sorted({line.split()[-1] for line in maps.splitlines() if "openblas" in line}):
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_get_num_threads64_", "scipy_openblas_get_num_threads", "openblas_get_num_threads"):
            if hasattr(library, name):
                return int(getattr(library, name)())
    return None
