"""What the benchmarks share: sides that take turns, pinned threads, peers, targets, tables and files.

A side is a function without arguments that does the whole of what is timed. The sides of a comparison run in turn,
repeat after repeat, in one process with as many threads each, so that a machine whose speed drifts slows all of them;
what to quote is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from analysis.commands.cli import count, json_file
from analysis.commands.command_line import OneLineParser, run_command
from analysis.commands.provenance import provenance
from lance_ref.algebra.kernels import threads as kernels
from lance_ref.io.whole_file import write_json

Side = Callable[[], Any]

PAUSE_SECONDS = 0.1
"""Before each turn. Idle threads of OpenBLAS go on spinning for some hundredths, at the cost of whoever is next."""
TURN_SECONDS = 0.02
"""Sides that are faster are called several times a turn."""
PEERS = ("torch", "tensorly", "fvcore", "threadpoolctl")
"""Of the extra ``[bench]``, by the names of their packages."""


# ---- turns -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a side, in each repeat.

    Attributes
    ----------
    wall, cpu : tuple of float
        By the clock, and of the processor: all threads, and processes that the side started and waited for.
    calls : int
        Of each repeat; the seconds are their mean.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)

    def as_json(self) -> dict[str, float]:
        """Median, fastest and slowest by the clock, median and fastest of the processor."""
        return {
            "median": self.median,
            "min": min(self.wall),
            "max": max(self.wall),
            "cpu_median": self.cpu_median,
            "cpu_min": min(self.cpu),
            "calls": self.calls,
        }


def timed(sides: Mapping[str, Side], repeats: int) -> dict[str, Timing]:
    """Time the sides in turn.

    One turn more comes first. It is not counted: it compiles, fills caches, and says how many calls make a turn of
    :data:`TURN_SECONDS`.
    """
    calls = {name: max(1, math.ceil(TURN_SECONDS / _seconds(side, 1)[0])) for name, side in sides.items()}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            time.sleep(PAUSE_SECONDS)
            spent[name].append(_seconds(side, calls[name]))
    return {
        name: Timing(tuple(wall for wall, _ in pairs), tuple(cpu for _, cpu in pairs), calls[name])
        for name, pairs in spent.items()
    }


def once(side: Side) -> Timing:
    """The time of a single call, for what takes too long to be called twice."""
    wall, cpu = _seconds(side, 1)
    return Timing((wall,), (cpu,), 1)


def _seconds(side: Side, calls: int) -> tuple[float, float]:
    """Of one call, by the clock and of the processor."""
    cpu, wall = _cpu_seconds(), time.perf_counter()
    for _ in range(calls):
        side()
    return (time.perf_counter() - wall) / calls, (_cpu_seconds() - cpu) / calls


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


# ---- peers and threads -------------------------------------------------------------------


@cache
def peer(name: str) -> Any:
    """The library of that name; None where it is not installed, which is said once, in a line."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: skipped (python -m pip install -e '.[bench]')", flush=True)
        return None


@contextmanager
def pinned(threads: int, peers: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Inside the ``with`` block every library uses that many threads; afterwards as many as before.

    Parameters
    ----------
    threads : int
    peers : sequence of str
        Libraries that take part. They are loaded first, as only what is loaded can be pinned.

    Yields
    ------
    dict
        What was asked for, and what each library says it uses.
    """
    import scipy.linalg  # noqa: F401  (it loads a BLAS of its own)

    loaded = {name: peer(name) for name in (*peers, "threadpoolctl")}
    torch, control = loaded.get("torch"), loaded["threadpoolctl"]
    before = os.environ.get("LANCE_REF_THREADS")
    with ExitStack() as undo:
        _set_own_threads(str(threads))
        undo.callback(_set_own_threads, before)
        found: dict[str, Any] = {"asked": threads, "lance_ref": kernels._threads()}
        if control is not None:
            undo.enter_context(control.threadpool_limits(threads))
        if torch is not None:
            undo.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
            found["torch"] = torch.get_num_threads()
        if control is not None:
            found["libraries"] = [
                {key: pool.get(key) for key in ("prefix", "version", "architecture", "num_threads")}
                for pool in control.threadpool_info()
            ]
        yield found


def _set_own_threads(threads: str | None) -> None:
    """What ``LANCE_REF_THREADS`` says, also where it was read before."""
    if threads is None:
        os.environ.pop("LANCE_REF_THREADS", None)
    else:
        os.environ["LANCE_REF_THREADS"] = threads
    kernels._threads.cache_clear()
    kernels._pool.cache_clear()


def peer_versions() -> dict[str, str | None]:
    """Of all peers; None for those that are not installed."""
    versions: dict[str, str | None] = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


# ---- what is printed ---------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three digits or more; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def span(seconds: Mapping[str, float] | None, unit: float = 1e-3) -> str:
    """``fastest-slowest`` of what :meth:`Timing.as_json` gives, milliseconds by default; a dash for None."""
    return "-" if seconds is None else f"{number(seconds['min'] / unit)}-{number(seconds['max'] / unit)}"


class Table:
    """Rows that are printed as they come, under one header."""

    def __init__(self, *columns: str, first: int = 24, width: int = 9) -> None:
        self.widths = [first, *(max(len(column), width) for column in columns[1:])]
        self.row(*columns)

    def row(self, *cells: str) -> None:
        name, *others = (cell.rjust(width) for cell, width in zip(cells, self.widths, strict=True))
        print("  ".join([name.strip().ljust(self.widths[0]), *others]), flush=True)


@dataclass(frozen=True)
class Target:
    """A figure that was aimed at.

    Attributes
    ----------
    what : str
    found, limit : float
    at_least : bool
        Whether ``limit`` is the least, not the most.
    """

    what: str
    found: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "found": self.found,
            "at_least" if self.at_least else "at_most": self.limit,
            "met": self.met,
        }

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return f"{'met   ' if self.met else 'missed'}  {self.what}: {self.found:.3g}, {bound} {self.limit:g}"


# ---- the command -------------------------------------------------------------------------


def parser(module: str, doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; its description is the first paragraph of ``doc``."""
    p = OneLineParser(prog=f"python -m {module}", description=(doc or "").split("\n\n")[0])
    p.add_argument("--threads", type=count, default=2, help="threads of every side (default: %(default)s)")
    p.add_argument("--repeats", type=count, default=repeats, help="counted turns of each side (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    p.add_argument("--output", type=json_file, help="also write the figures as JSON")
    p.set_defaults(module=module)
    return p


def run(
    p: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    peers: Sequence[str] = (),
) -> int:
    """Parse, pin, measure, judge and write; gives the exit code, which is 0 if a target is missed, too.

    Parameters
    ----------
    p : ArgumentParser
        Of :func:`parser`.
    arguments : sequence of str, optional
        Those of the process by default.
    measure : callable
        Gets the options, prints its rows, and gives what is written; a list of :class:`Target` under ``"targets"``,
        which are for the full sizes.
    peers : sequence of str
        Libraries that take part, if they are installed.
    """

    def work(options: argparse.Namespace) -> None:
        with pinned(options.threads, peers) as threads:
            versions = {**provenance(options.module, 0)["versions"], **{k: v for k, v in peer_versions().items() if v}}
            print(
                f"{options.threads} threads; {', '.join(f'{name} {of}' for name, of in versions.items())}", flush=True
            )
            found = measure(options)
        targets: list[Target] = [] if options.quick else found.pop("targets", [])
        for target in targets:
            print(target)
        if options.output:
            document = {**provenance(options.module, 0), "pinned": threads, "peers": peer_versions()}
            document |= {**found, "targets": [target.as_json() for target in targets]}
            write_json(options.output, document)

    return run_command(p, arguments, work)
