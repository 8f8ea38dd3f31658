"""Which faults the tests notice: ``python tests/mutations.py [PATH ...]``.

Small faults are listed in ``tests/data/mutations.toml``, each with the tests that must fail when it is planted. This
script plants them one at a time in a copy of the working tree, in a temporary folder, runs the tests, and says which
faults were killed (a test failed, or did not end) and which live. With paths, of files or folders, only the faults in
these are planted; to see whether a module of your own is covered, put a few faults into the list.

An entry of the list is headed by its file:

    [["lance_ref/lance/knapsack.py"]]
    old = 'if budget < least:'
    new = 'if budget <= least:'
    tests = 'tests/lance/test_knapsack.py'
    why = 'the least budget is refused'

``old`` occurs exactly once in the file. ``tests`` are what pytest takes, with spaces between. A fault that no test can
notice, because both texts do the same, has ``equivalent`` with the reason in place of ``tests``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "data" / "mutations.toml"
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "venv", "node_modules")
ALL_LOOPS = "lance_ref/algebra/kernels/threads.py"
"""How every loop is compiled, which Numba's cache of a loop in another file does not know of."""
SECONDS = 180.0
"""After which the tests of one fault count as failed."""


@dataclass(frozen=True)
class Mutation:
    """A fault: ``old`` becomes ``new`` in ``path``, and one of ``tests`` must fail, unless it is ``equivalent``."""

    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str
    equivalent: bool

    def planted(self, source: str) -> str:
        """The file with the fault."""
        if source.count(self.old) != 1:
            raise ValueError(f"{self.path} has {self.old!r} {source.count(self.old)} times, expected once")
        return source.replace(self.old, self.new)

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def read_list(path: Path = LIST) -> list[Mutation]:
    """All mutations, in the order of the file."""
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    found = []
    for file, entries in document.items():
        for entry in entries:
            given = set(entry)
            if given not in ({"old", "new", "tests", "why"}, {"old", "new", "equivalent"}):
                raise ValueError(
                    f"{path.name}: an entry of {file} has {sorted(given)}, expected old, new, tests and why, "
                    "or old, new and equivalent"
                )
            reason = entry.get("equivalent")
            tests = tuple(entry.get("tests", "").split())
            found.append(Mutation(file, entry["old"], entry["new"], tests, reason or entry["why"], reason is not None))
    return found


class Tree:
    """A copy of the working tree with one fault at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.planted = 0
        shutil.copytree(ROOT, folder, ignore=NOT_COPIED, symlinks=True)

    def fails(self, mutation: Mutation) -> str:
        """``"killed"``, ``"alive"``, or what else came of the tests."""
        file = self.folder / mutation.path
        source, stamp = file.read_bytes(), file.stat()
        self.planted += 1
        # Python and Numba know a file again by its time stamp and size: each fault has a time of its own, and the
        # sound file its old one, so that neither is taken for the other and what was compiled of the rest stays good
        when = int(stamp.st_mtime) + self.planted
        try:
            file.write_bytes(mutation.planted(source.decode()).encode())
            os.utime(file, (when, when))
            code, said = self.run(mutation.tests, cache=str(self.planted) if mutation.path == ALL_LOOPS else "all")
        finally:
            file.write_bytes(source)
            os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        if code == 0:
            return "alive"
        # 1: a test failed; None: it did not end; below 0: a loop that wrote beside its arrays ended the process
        return "killed" if code is None or code == 1 or code < 0 else f"not tested, pytest ended with {code}: {said}"

    def run(self, tests: Sequence[str], seconds: float | None = SECONDS, cache: str = "all") -> tuple[int | None, str]:
        """Exit code of pytest (None if it did not end in time) and the last line that it wrote."""
        env = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "NUMBA_CACHE_DIR": str(self.folder / ".numba" / cache),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        # pytest's own process: to start others for two or three tests would take longer than the tests
        options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=--doctest-modules"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        with subprocess.Popen(
            command, cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            RUNNING.add(process)
            try:
                if STOPPING.is_set():
                    kill(process)
                out, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                kill(process)
                return None, ""
            finally:
                RUNNING.discard(process)
        return process.returncode, (out.decode(errors="replace").strip() or "nothing").splitlines()[-1][:200]


RUNNING: set[subprocess.Popen[bytes]] = set()
"""Processes of pytest, each with a group of its own, which a Ctrl-C does not reach."""

STOPPING = threading.Event()


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def plant(mutations: Sequence[Mutation], jobs: int) -> dict[Mutation, str]:
    """What came of each mutation; says so as they come."""
    outcomes: dict[Mutation, str] = {}
    with tempfile.TemporaryDirectory(prefix="lance_ref-mutations-") as folder:
        executor = ThreadPoolExecutor(jobs)
        try:
            trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
            for job in range(jobs):
                trees.put(Tree(Path(folder) / str(job)))
            check_sound(trees, mutations)

            def one(mutation: Mutation) -> tuple[str, float]:
                tree, start = trees.get(), time.monotonic()
                try:
                    return "" if STOPPING.is_set() else tree.fails(mutation), time.monotonic() - start
                finally:
                    trees.put(tree)

            futures = {executor.submit(one, mutation): mutation for mutation in mutations}
            for future in as_completed(futures):
                mutation, (outcome, seconds) = futures[future], future.result()
                outcomes[mutation] = outcome
                print(f"[{len(outcomes)}/{len(mutations)}] {outcome:<6} {mutation} ({seconds:.1f} s)", flush=True)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave the folder
            STOPPING.set()
            for process in list(RUNNING):
                kill(process)
            executor.shutdown(wait=True, cancel_futures=True)
    return outcomes


def check_sound(trees: queue.SimpleQueue[Tree], mutations: Sequence[Mutation]) -> None:
    """The tests must pass without a fault, or they would kill everything."""
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    print(f"{len(mutations)} faults; first their tests without any", flush=True)
    tree = trees.get()
    code, said = tree.run(tests, seconds=None) if tests else (0, "")
    trees.put(tree)
    if code != 0:
        raise ValueError(f"the tests do not pass without a fault ({said}); run them with: python -m pytest")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    p = Parser(prog="mutations.py", description="plant small faults in a copy, and see who notices")
    p.add_argument("paths", nargs="*", metavar="PATH", help="only faults in these files or folders (all)")
    p.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="at a time (half the cores)")
    p.add_argument("--list", action="store_true", help="print the faults and plant none")
    options = p.parse_args(arguments)
    try:
        if options.jobs < 1:
            raise ValueError(f"--jobs is {options.jobs}, expected 1 or more")
        mutations = chosen(read_list(), options.paths)
    except (OSError, ValueError) as error:
        print(f"mutations.py: {error}", file=sys.stderr)
        return 2
    if options.list:
        for mutation in mutations:
            print(f"{mutation}{' (equivalent)' if mutation.equivalent else ''}")
        return 0
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        outcomes = plant([mutation for mutation in mutations if not mutation.equivalent], options.jobs)
    except KeyboardInterrupt:
        print("mutations.py: stopped; nothing is left behind", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"mutations.py: {error}", file=sys.stderr)
        return 2
    return report(mutations, outcomes)


def chosen(mutations: list[Mutation], paths: Sequence[str]) -> list[Mutation]:
    """Those in the given files and folders; ValueError where a path has none."""
    found: list[Mutation] = []
    for path in paths:
        full = Path(path).resolve()
        inside = [m for m in mutations if full == ROOT / m.path or full in (ROOT / m.path).parents]
        if not inside:
            raise ValueError(f"no fault in {path} is listed in {LIST.relative_to(ROOT)}")
        found += [m for m in inside if m not in found]
    return found if paths else mutations


def report(mutations: Sequence[Mutation], outcomes: dict[Mutation, str]) -> int:
    """Print the survivors and the totals; 1 if there are survivors."""
    survivors = {mutation: outcome for mutation, outcome in outcomes.items() if outcome != "killed"}
    for mutation, outcome in survivors.items():
        print(f"\n{outcome}: {mutation}\n  - {mutation.old!r}\n  + {mutation.new!r}\n  {' '.join(mutation.tests)}")
    killed, equivalent = len(outcomes) - len(survivors), len(mutations) - len(outcomes)
    share = f" ({100 * killed / len(outcomes):.1f} %)" if outcomes else ""
    print(f"\n{killed} of {len(outcomes)} killed{share}, {len(survivors)} alive, {equivalent} equivalent")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
