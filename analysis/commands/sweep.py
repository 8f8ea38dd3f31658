"""Many independent runs, each run once: cells of an experiment, in local processes or on a Dask cluster.

A cell is a dict of keyword arguments for one function. Its outcome is a file named after both, so that a
sweep that was stopped, by whatever, goes on where it was, and one that grew runs what is new. Only the
process that called :func:`run_cells` writes files; each appears whole or not at all.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from analysis.commands import stopping
from analysis.commands.names import one_line
from lance_ref.io import plugins
from lance_ref.io.progress import progress_bar
from lance_ref.io.whole_file import read_json, write_json

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = "lance_ref sweep cell"
VERSION = 1
MOST_BYTES = 2**28
"""The largest size of the file of a finished cell."""
CONNECT_SECONDS = 8.0
"""How long a scheduler may take to answer."""

Outcome = dict[str, Any]
"""A finished cell has result, seconds and provenance; a failed one has error and traceback."""

_ONE_AT_A_TIME = threading.Lock()  # a Dask worker may have several threads, but NumPy's settings are the process's


@dataclass(frozen=True)
class Task:
    """One cell to run: ``key`` names its file, ``cell`` is as JSON gives it back, ``differs`` tells it from others."""

    key: str
    function: str
    cell: dict[str, Any]
    differs: frozenset[str] | None = None

    def __str__(self) -> str:
        shown = [name for name in self.cell if self.differs is None or name in self.differs]
        return " ".join(f"{name}={json.dumps(self.cell[name])}" for name in shown) or "(no arguments)"


def run_cells(
    cells: Sequence[dict[str, Any]],
    function: str,
    folder: str | os.PathLike[str],
    *,
    jobs: int = 2,
    scheduler: str | None = None,
    progress: bool | None = None,
    expected: float | None = None,
) -> list[dict[str, Any]]:
    """Run ``function(**cell)`` for every cell that has not been run before, and return all results in order.

    Parameters
    ----------
    cells : sequence of dicts
        Keyword arguments that JSON can express; the function gets them as JSON gives them back. Equal cells run once.
    function : str
        ``"package.module:name"``, importable where the cells run; returns a dict that JSON can express.
    folder : path
        Of the finished cells, ``<key>.json`` each; made if need be. ``key`` is the SHA-256 of function and cell, so
        that one folder can serve any number of sweeps.
    jobs : int
        Processes on this machine, each with one thread for its arithmetic. Not used with ``scheduler``.
    scheduler : str, optional
        Address of a Dask scheduler, ``"tcp://host:8786"``, whose workers can import the function.
    progress : bool, optional
        True: a bar on standard error; False: nothing. By default a bar if that is a terminal, else a line for each
        cell.
    expected : float, optional
        Seconds of one cell, as measured before. With it the first line says how long all of them will take; without it
        that is said when the first one is finished. Cells of an earlier run, if there are any, tell it better.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, or a cell is not JSON; nothing has run then.
    ImportError, ConnectionError
        If Dask is not installed, or the scheduler does not answer or goes away.
    RuntimeError
        If cells failed, when all others have finished: how many, and the first one's cell and message. They run again
        next time.

    Notes
    -----
    A finished cell stands whatever became of the code since; one line on standard error says how many results are from
    the folder, and how many of these were made by other sources. A file that is damaged or belongs to something else is
    reported, and replaced when the cell has run again.

    A worker that is killed takes down no cell but its own. On a cluster another worker runs that cell (Dask gives up
    after its ``allowed-failures``); local processes run it once more, alone.

    Two processes may sweep into one folder: the second waits for the first. Where folders cannot be locked, as in some
    network file systems, both run, and at worst a cell runs twice. Within a process one sweep runs at a time.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs is {jobs!r}, expected a positive integer")
    _load(function)
    tasks = _told_apart([_task(position, cell, function) for position, cell in enumerate(cells)])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stopping.keep(f"finished cells are kept in {folder}, and the same command goes on from there")
    with _alone_in(folder, progress is not False):
        outcomes = _finish(tasks, folder, jobs, scheduler, progress, expected)
    return [outcomes[task.key]["result"] for task in tasks]


def _finish(
    tasks: Sequence[Task],
    folder: Path,
    jobs: int,
    scheduler: str | None,
    progress: bool | None,
    expected: float | None,
) -> dict[str, Outcome]:
    """The outcomes of all tasks by key, from the folder or from running them."""
    outcomes: dict[str, Outcome] = {}
    missing: dict[str, Task] = {}
    for task in tasks:
        if task.key not in outcomes and task.key not in missing:
            found = _read(folder / f"{task.key}.json", task)
            if found is None:
                missing[task.key] = task
            else:
                outcomes[task.key] = found
    if outcomes and progress is not False:
        print(_from_before(outcomes, len(outcomes) + len(missing), folder), file=sys.stderr, flush=True)
    if missing:
        waiting = list(missing.values())
        outlook = Outlook(len(waiting), jobs if scheduler is None else None, folder, expected, list(outcomes.values()))
        if progress is not False:
            print(outlook.first_line(), file=sys.stderr, flush=True)
        arriving = _in_processes(waiting, jobs) if scheduler is None else _on_cluster(waiting, scheduler)
        _collect(arriving, outcomes, folder, len(outcomes) + len(missing), progress, outlook)
    _raise_failures([outcomes[key] for key in missing], list(missing.values()))
    return outcomes


@contextmanager
def _alone_in(folder: Path, says: bool) -> Iterator[None]:
    """Wait until no other sweep works in the folder. Nothing is left in it: the folder itself is what is locked."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if says:
                    print(f"sweep: another run works in {folder}; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def run_cell(task: Task) -> Outcome:
    """Run one cell in this process; whatever it raises becomes part of the outcome."""
    # read when lance_ref's first compiled loop runs, which is in this cell or was in an earlier one
    os.environ["LANCE_REF_THREADS"] = "1"
    with _ONE_AT_A_TIME:
        try:
            where = _where()  # now: at the end of a long run the sources may be others
            started = time.perf_counter()
            plugins.load_plugins()
            result = _load(task.function)(**task.cell)
            if not isinstance(result, dict):
                raise TypeError(f"{task.function} returned {type(result).__name__}, expected a dict that JSON can hold")
            result = json.loads(json.dumps(result))
            return {"result": result, "seconds": time.perf_counter() - started, "provenance": where}
        except (Exception, SystemExit) as error:
            return {"error": f"{type(error).__name__}: {one_line(error)}", "traceback": traceback.format_exc()}


def _where() -> dict[str, Any]:
    """Versions, sources, machine and threads of this process; command and seed are the cell's own business."""
    from analysis.commands.provenance import code_fingerprint, provenance

    whole = {**provenance("analysis.commands.sweep", 0), "sources": code_fingerprint()}
    return {name: whole[name] for name in ("versions", "sources", "machine", "threads")}


# ---- cells and their files -----------------------------------------------------------------


def _load(function: str) -> Callable[..., Any]:
    """The function that ``"package.module:name"`` names."""
    module, colon, name = function.partition(":") if isinstance(function, str) else ("", "", "")
    if not (colon and module and name) or module == "__main__":
        raise ValueError(f"function is {function!r}, expected 'package.module:name' of a module that can be imported")
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ValueError(f"function is {function!r}, but {module} has no function {name!r}")
    return found


def _task(position: int, cell: Any, function: str) -> Task:
    if not isinstance(cell, dict) or any(not isinstance(name, str) for name in cell):
        raise TypeError(f"cell {position} is {cell!r}, expected a dict of keyword arguments")
    try:
        text = json.dumps([function, cell], sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"cell {position} is {cell!r}, which JSON cannot express: {one_line(error)}") from None
    return Task(hashlib.sha256(text.encode()).hexdigest(), function, json.loads(json.dumps(cell)))


def _told_apart(tasks: list[Task]) -> list[Task]:
    """The tasks, each knowing by which arguments the cells differ; where they are all equal, all arguments tell."""
    names = {name for task in tasks for name in task.cell}
    values = {name: {json.dumps(task.cell.get(name), sort_keys=True) for task in tasks} for name in names}
    differing = frozenset(name for name in names if len(values[name]) > 1) or None
    return [replace(task, differs=differing) for task in tasks]


def _read(path: Path, task: Task) -> Outcome | None:
    """A finished cell's file, or None if there is none; of one that cannot be trusted standard error tells."""
    try:
        document = read_json(path, MOST_BYTES)
        if (document.get("format"), document.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"is no finished cell of version {VERSION}")
        if (document.get("function"), document.get("cell")) != (task.function, task.cell):
            raise ValueError("belongs to another cell")
        if not isinstance(document.get("result"), dict):
            raise ValueError("holds no result")
        return document
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        print(f"sweep: {path}: {one_line(error)}; the cell is run again", file=sys.stderr, flush=True)
        return None


@dataclass
class Outlook:
    """How long cells will take, as an estimate: ``count`` of them, ``jobs`` at a time (None: on a cluster)."""

    count: int
    jobs: int | None
    folder: Path
    expected: float | None
    before: Sequence[Outcome]

    def first_line(self) -> str:
        """What there is to run, how long it will take, and where what is finished is kept."""
        at_a_time = "" if self.jobs is None else f", {min(self.jobs, self.count)} at a time"
        runs = f"{self.count} run{'s' if self.count > 1 else ''}{at_a_time}"
        kept = f"what is finished is kept in {self.folder}"
        if self.before:
            self.expected = sum(outcome["seconds"] for outcome in self.before) / len(self.before)
            how = self._estimate(self.count, self.expected, "as the finished ones took")
        elif self.expected is not None:
            how = self._estimate(self.count, self.expected, "as measured before on two cores")
        else:
            later = "how long they take is estimated after the first one"
            how = later if self.count > 1 else "how long it takes was not measured before"
        return f"sweep: {runs}; {how}; {kept}"

    def after_first(self, seconds: float) -> str:
        """An estimate of the rest, once, where there was none before."""
        if self.expected is not None or self.count < 2:
            return ""
        self.expected = seconds
        return f"sweep: {self._estimate(self.count - 1, seconds, 'as the first one took')}"

    def _estimate(self, count: int, seconds: float, basis: str) -> str:
        total = seconds * -(-count // (self.jobs or count))
        return f"about {duration(total)} (estimate: {duration(seconds)} a run, {basis})"


def duration(seconds: float) -> str:
    """A time in words, to what an estimate can tell.

    >>> duration(0.4), duration(42.4), duration(160), duration(9000)
    ('1 s', '42 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _from_before(found: Mapping[str, Outcome], total: int, folder: Path) -> str:
    """How many cells had been finished, when, and whether by the sources at hand."""
    from analysis.commands.provenance import code_fingerprint

    days = {time.strftime("%Y-%m-%d", time.localtime((folder / f"{key}.json").stat().st_mtime)) for key in found}
    origins = [outcome.get("provenance") for outcome in found.values()]
    sources = [origin.get("sources") if isinstance(origin, dict) else None for origin in origins]
    unknown, same = sources.count(None), sources.count(code_fingerprint())
    unlike = {"other sources than now": len(sources) - unknown - same, "unknown sources": unknown}
    line = f"sweep: {len(found)} of {total} cells from {folder}, made {' to '.join(sorted({min(days), max(days)}))}"
    if same < len(found):
        line += f" ({', '.join(f'{count} by {which}' for which, count in unlike.items() if count)}"
        line += "; another folder runs them anew)"
    return line


def _collect(
    arriving: Iterator[tuple[Task, Outcome]],
    outcomes: dict[str, Outcome],
    folder: Path,
    total: int,
    progress: bool | None,
    outlook: Outlook,
) -> None:
    """Store each outcome as it comes, and say so."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    lines = progress is None and not terminal
    with progress_bar("cells", total, progress, done=len(outcomes)) as advance:
        for task, outcome in arriving:
            if "error" not in outcome:
                about = {"format": FORMAT, "version": VERSION, "function": task.function, "cell": task.cell}
                write_json(folder / f"{task.key}.json", about | outcome)
            outcomes[task.key] = outcome
            how = f"failed, {outcome['error']}" if "error" in outcome else f"{outcome['seconds']:.1f} s"
            advance(1, how.partition(",")[0])
            if lines:
                print(f"[{len(outcomes)}/{total}] {task}: {how}", file=sys.stderr, flush=True)
            later = "" if "error" in outcome else outlook.after_first(outcome["seconds"])
            if later and progress is not False:
                print(later, file=sys.stderr, flush=True)


def _raise_failures(outcomes: Sequence[Outcome], tasks: Sequence[Task]) -> None:
    failed = [(task, outcome) for task, outcome in zip(tasks, outcomes, strict=True) if "error" in outcome]
    if failed:
        task, outcome = failed[0]
        error = RuntimeError(
            f"{len(failed)} of the {len(tasks)} cells that ran failed, the first with {task}: {outcome['error']}"
        )
        if outcome["traceback"]:
            error.add_note(outcome["traceback"])
        raise error


# ---- where cells run -------------------------------------------------------------------------


def _in_processes(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Outcome]]:
    """Outcomes from local processes, as they come.

    When a process dies its pool dies with it. The cells that were under way are then run one at a time,
    so that the one that kills its process is found and the others finish.
    """
    from joblib.externals.loky import get_reusable_executor

    waiting, suspects = list(tasks), list[Task]()
    try:
        while waiting or suspects:
            alone = bool(suspects)
            batch = [suspects.pop(0)] if alone else waiting
            taken: list[Task] = []
            done: set[str] = set()
            lost: list[Task] = []
            try:
                for task, outcome in _pool(batch, 1 if alone else jobs, taken):
                    done.add(task.key)
                    yield task, outcome
            except BrokenProcessPool as error:
                lost = [task for task in taken if task.key not in done]
                if alone and lost:
                    yield lost.pop(), {"error": f"its process died: {_first_sentence(error)}", "traceback": ""}
            suspects += lost
            if not alone:
                away = done | {task.key for task in lost}
                waiting = [task for task in waiting if task.key not in away]
    finally:
        # else idle processes hold their memory for minutes, and after Ctrl-C a cell would run to its end
        get_reusable_executor(reuse=True, kill_workers=True).shutdown(wait=True, kill_workers=True)


def _pool(tasks: Sequence[Task], jobs: int, taken: list[Task]) -> Iterator[tuple[Task, Outcome]]:
    """One pool of processes; notes in ``taken`` what it has been given."""
    from multiprocessing import resource_tracker

    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky.backend import resource_tracker as loky_tracker

    def feed() -> Iterator[Any]:
        for task in tasks:
            taken.append(task)
            yield delayed(_run_here)(task, os.getpid())

    # With one job joblib would run cells in this process, and a cell that dies would take the sweep along;
    # so there are two processes at least, and pre_dispatch decides how many have something to do.
    with parallel_config("loky", inner_max_num_threads=1):
        pool = Parallel(max(2, jobs), return_as="generator_unordered", pre_dispatch=jobs, batch_size=1, max_nbytes=None)
        for tracker in (resource_tracker, loky_tracker):  # starting one lets Ctrl-C through again, so they go first
            tracker.ensure_running()
        with stopping.left_to_parent():  # the processes start here, and what Ctrl-C does in them is decided
            outcomes = pool(feed())
        try:
            for outcome in outcomes:  # noqa: UP028  (yield from would close the pool before the filter below is set)
                yield outcome
        finally:
            with warnings.catch_warnings():  # where a sweep ends early, its error says why, in one line
                warnings.filterwarnings("ignore", ".*tasks.* cancelled")
                outcomes.close()


def _run_here(task: Task, parent: int) -> tuple[Task, Outcome]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    _end_with(parent)
    return task, run_cell(task)


@cache
def _end_with(parent: int) -> None:
    """Have this process end with the one that started it: were that killed, nobody would wait for the cell."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_cluster(tasks: Sequence[Task], scheduler: str) -> Iterator[tuple[Task, Outcome]]:
    """Outcomes from the workers of a Dask scheduler, as they come."""
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise ImportError("a scheduler needs dask.distributed: python -m pip install distributed") from None
    # A client that gave up before closes itself when it is collected, and inside the next one that waits for ever.
    gc.collect()
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ConnectionError(f"scheduler {scheduler!r} does not answer: {one_line(error)}") from None
    with client:
        if not client.scheduler_info()["workers"]:
            print(f"sweep: {scheduler} has no workers yet; waiting for one", file=sys.stderr, flush=True)
        # the same cell of two sweeps at the same time is one task of the scheduler's
        futures = {client.submit(run_cell, task, key=f"lance_ref-sweep-{task.key}"): task for task in tasks}
        for future in as_completed(list(futures), loop=client.loop):
            task = futures.pop(future)
            if future.status == "finished":
                yield task, future.result()
            elif future.status == "error":  # run_cell raises nothing: the workers died, or cannot import it
                reason = future.exception()
                yield task, {"error": f"{type(reason).__name__}: {_first_sentence(reason)}", "traceback": ""}
            else:
                raise ConnectionError(f"scheduler {scheduler!r} went away; finished cells are kept in the folder")


def _first_sentence(error: BaseException | None) -> str:
    return one_line(error).partition(". ")[0] if error is not None else "no reason given"
