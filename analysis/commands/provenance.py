"""Where a results file comes from: command, versions, seed, machine, threads."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lance_ref
from lance_ref.algebra.kernels import threads as kernels
from lance_ref.engine.workers import linked_blas

PACKAGES = ("lance_ref", "analysis", "experiments")

THREAD_SETTINGS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "LANCE_REF_THREADS")
"""Environment variables that decide how many threads the arithmetic uses."""

BLAS_THREADS = (
    "scipy_openblas_get_num_threads64_",
    "scipy_openblas_get_num_threads",
    "openblas_get_num_threads64_",
    "openblas_get_num_threads",
    "MKL_Get_Max_Threads",
)
"""Functions of the libraries that NumPy may be linked to, which say how many threads a matrix product takes."""


def provenance(module: str, seed: int) -> dict[str, Any]:
    """What every results file says of the run of ``module``, whose arguments are the process's own.

    ``threads`` has the settings of :data:`THREAD_SETTINGS` and, under ``used``, how many threads matrix products
    (``blas``, None where the library cannot be asked) and compiled loops (``loops``) take in this process; files that
    were written before lack ``used``. With other numbers the last bits of a result may be others.
    """
    import numba
    import numpy
    import scipy

    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "seed": seed,
        "versions": {
            "lance_ref": lance_ref.__version__,
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "scipy": scipy.__version__,
            "numba": numba.__version__,
        },
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()},
        "threads": {
            **{name: os.environ.get(name, "default") for name in THREAD_SETTINGS},
            "used": {"blas": blas_threads(), "loops": kernels._threads()},
        },
    }


def blas_threads() -> int | None:
    """How many threads NumPy's matrix products take in this process; None where the library cannot be asked."""
    for name in BLAS_THREADS:
        function = getattr(linked_blas(), name, None)
        if function is not None:
            return int(function())
    return None


@cache
def code_fingerprint() -> str:
    """SHA-256 of the sources of all packages: what ran on other code may say nothing about this one."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        found = find_spec(package)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(f"the package {package} is missing: install the project again")
        folder = Path(found.origin).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()
