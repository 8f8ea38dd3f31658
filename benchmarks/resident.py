"""The most memory that a process holds while it does something, as Linux counts it.

``resource.getrusage`` will not do: its ``ru_maxrss`` is handed down from the process that started this one. The
kernel's own mark, ``VmHWM``, is not, and can be taken back to what is held at the moment.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

from analysis.commands import stopping

STATUS, MARK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TAKE_BACK = "5"
"""What, written to :data:`MARK`, sets the highest resident size to the present one."""


class Resident(NamedTuple):
    """Bytes in physical memory, libraries and interpreter included.

    Attributes
    ----------
    before : int
        When all was ready, after one call that did not count.
    peak : int
        At most, during the second call.
    """

    before: int
    peak: int


def measurable() -> bool:
    """Whether this system says how much memory a process holds."""
    return STATUS.exists() and MARK.exists()


def peak_of(side: Callable[[], Any]) -> Resident:
    """The resident memory of this process before and at the peak of ``side()``."""
    side()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what was freed and not yet given back is no part of what is held
    MARK.write_text(TAKE_BACK, encoding="ascii")
    before = _status("VmRSS")
    side()
    return Resident(before, _status("VmHWM"))


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a fresh process, which nothing was loaded into before."""
    resource_tracker.ensure_running()  # starting it lets Ctrl-C through again, so it goes first
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with stopping.left_to_parent():  # Ctrl-C of a terminal reaches both, and is one line here
            future = pool.submit(function, *arguments)
        try:
            return future.result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def _status(field: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.removesuffix("kB"))
    raise LookupError(f"{STATUS} has no {field}")
