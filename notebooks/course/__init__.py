"""What the lessons share. ``import course`` is the set-up, and the first line of each of them.

It works wherever this folder lies beside the notebook: in a checkout opened with JupyterLab, on Binder, and on Colab
after ``!git clone ADDRESS lance-ref`` and ``%cd lance-ref/notebooks``. If ``lance_ref`` is missing, it is installed
from the checkout.

Examples
--------
>>> import course
>>> course.expect(1 + 1 == 2, "One and one is two.")
>>> course.check("2.1", None)
2.1: no answer yet
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from course.checking import check
from course.claims import expect
from course.running import batch, network
from course.sliders import explore

__all__ = ["batch", "check", "expect", "explore", "network", "set_up"]

ROOT = Path(__file__).resolve().parents[2]


def set_up(root: Path = ROOT) -> None:
    """Make ``import lance_ref`` work, with the plain forward pass.

    The library may fuse operations, which changes what is on the tape. The lessons explain operations one by one, so
    the fused forward pass is switched off. That has to be said before ``lance_ref`` is imported for the first time.
    Their matrices are small, so one thread of the linear algebra is faster than several, and the last digits do not
    depend on the number of cores.

    Raises
    ------
    ModuleNotFoundError
        If ``lance_ref`` is not installed and ``root`` is not its checkout.
    """
    os.environ["LANCE_REF_FUSE"] = "0"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if importlib.util.find_spec("lance_ref") is not None:
        return
    if not (root / "pyproject.toml").is_file():
        raise ModuleNotFoundError(
            f"lance_ref is not installed, and {root} has no pyproject.toml, so it is not the checkout: clone the "
            "repository and open the lesson in its folder notebooks/"
        )
    print("installing lance_ref from the checkout (once, about a minute)")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", str(root)], check=True)
    importlib.invalidate_caches()


set_up()
