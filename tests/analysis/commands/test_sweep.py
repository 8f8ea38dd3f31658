"""Sweeps: every cell runs once, whatever is killed in between, and what is stored is the cell's own result."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_cells import read_log

from analysis.commands import sweep
from analysis.commands.sweep import run_cells
from lance_ref.io.whole_file import sealed, write_json

HERE = Path(__file__).parents[2] / "support"
SQUARE, AWKWARD = "sweep_cells:square", "sweep_cells:awkward"


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process: for tests of what is stored and reported, not of where cells run."""
    monkeypatch.setenv("LANCE_REF_THREADS", "1")  # a cell sets it; put back afterwards
    monkeypatch.setattr(sweep, "_in_processes", lambda tasks, jobs: ((task, sweep.run_cell(task)) for task in tasks))


def squares(log: Path, xs: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"x": x, "log": str(log), **more} for x in xs]


def expected(xs: Any) -> list[dict[str, Any]]:
    return [{"square": x * x, "pair": [x, x]} for x in xs]


def starts(log: Path) -> Counter[str]:
    return Counter(words[1] for words in read_log(log) if words[0] == "start")


def stored(folder: Path) -> dict[Any, dict[str, Any]]:
    """The finished cells' documents by their ``x``."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return {document["cell"]["x"]: document for document in documents}


def wait_until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


# ---- what is stored -----------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
def test_every_cell_runs_once_and_results_keep_their_order(tmp_path: Path) -> None:
    """New cells run, finished and repeated ones do not, and a result from its file is the same as a fresh one."""
    log, folder = tmp_path / "log", tmp_path / "deep" / "cells"
    assert run_cells(squares(log, [3, 1, 3]), SQUARE, folder, progress=False) == expected([3, 1, 3])
    assert run_cells(squares(log, [2, 1, 3]), SQUARE, folder, progress=False) == expected([2, 1, 3])
    assert starts(log) == {"3": 1, "1": 1, "2": 1}
    reordered = [{"log": str(log), "x": 2}]
    assert run_cells(reordered, SQUARE, folder, progress=False) == expected([2])
    assert starts(log)["2"] == 1, "the order of the arguments must not matter"
    assert run_cells([], SQUARE, folder) == []


@pytest.mark.usefixtures("inline")
def test_a_finished_cell_says_what_it_is(tmp_path: Path) -> None:
    """The file holds function, cell, result, seconds and where it ran, under a key of 64 hex digits."""
    (cell,) = cells = squares(tmp_path / "log", [4])
    run_cells(cells, SQUARE, tmp_path / "cells", progress=False)
    (path,) = (tmp_path / "cells").iterdir()
    assert re.fullmatch(r"[0-9a-f]{64}\.json", path.name)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert (document["function"], document["cell"], document["result"]["square"]) == (SQUARE, cell, 16)
    assert document["seconds"] >= 0
    assert set(document["provenance"]) == {"versions", "sources", "machine", "threads"}
    assert document["provenance"]["threads"]["LANCE_REF_THREADS"] == "1"


@pytest.mark.usefixtures("inline")
def test_what_is_from_the_folder_and_by_which_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of before are told as such, with the day; those of other sources, or of files without them, apart."""
    log, folder = tmp_path / "log", tmp_path / "cells"
    run_cells(squares(log, [0, 1, 2]), SQUARE, folder, progress=False)
    for path in folder.iterdir():
        os.utime(path, (0, 43_200))
    capsys.readouterr()

    def line(xs: Any) -> str:
        assert run_cells(squares(log, xs), SQUARE, folder) == expected(xs)
        return capsys.readouterr().err.splitlines()[0]

    assert line([1, 2]) == f"sweep: 2 of 2 cells from {folder}, made 1970-01-01"
    for x in (0, 1):
        path = next(path for path in folder.iterdir() if json.loads(path.read_text())["cell"]["x"] == x)
        document = json.loads(path.read_text())
        if x == 0:
            del document["provenance"]["sources"]
        else:
            document["provenance"] = {"sources": "others"}
        write_json(path, document)
        os.utime(path, (0, 43_200))
    words = "made 1970-01-01 (1 by other sources than now, 1 by unknown sources; another folder runs them anew)"
    assert line([0, 1, 2, 3]) == f"sweep: 3 of 4 cells from {folder}, {words}"
    monkeypatch.setattr("analysis.commands.provenance.code_fingerprint", lambda: "newer")
    assert "(2 by other sources than now; another folder" in line([2, 3])
    assert starts(log) == {"0": 1, "1": 1, "2": 1, "3": 1}, "nothing runs again by itself"


def resealed(text: str) -> str:
    """Another document with a checksum of its own."""
    return json.dumps(sealed(json.loads(text)))


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], ""),
        (lambda text: "", ""),
        (lambda text: text.replace('"x": 5', '"x": 4'), "its checksum is not that of its contents"),
        (lambda text: "[" * 100_000, ""),
        (lambda text: "[1]", "expected a JSON object"),
        (lambda text: resealed(text.replace('"version": 1', '"version": 99')), "no finished cell"),
        (lambda text: resealed(text.replace('"x": 5', '"x": 6')), "another cell"),
        (lambda text: resealed(text.replace(SQUARE, AWKWARD)), "another cell"),
        (lambda text: resealed(text.replace('"result"', '"outcome"')), "no result"),
    ],
)
def test_a_damaged_or_foreign_file_is_not_trusted(
    damage: Callable[[str], str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names the file, the cell runs again, and the file is right afterwards."""
    log, folder = tmp_path / "log", tmp_path / "cells"
    run_cells(squares(log, [5]), SQUARE, folder, progress=False)
    (path,) = folder.iterdir()
    whole = path.read_text(encoding="utf-8")
    path.write_text(damage(whole), encoding="utf-8")
    capsys.readouterr()
    assert run_cells(squares(log, [5]), SQUARE, folder, progress=False) == expected([5])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert says in error
    assert starts(log)["5"] == 2
    assert run_cells(squares(log, [5]), SQUARE, folder, progress=False) == expected([5])
    assert starts(log)["5"] == 2


@pytest.mark.usefixtures("inline")
def test_two_sweeps_in_one_folder_do_no_harm(tmp_path: Path) -> None:
    """At worst a cell runs twice; every file is whole, and nothing else is left."""
    log, folder, xs = tmp_path / "log", tmp_path / "cells", range(40)
    results: list[Any] = [None, None]

    def go(which: int) -> None:
        results[which] = run_cells(squares(log, xs), SQUARE, folder, progress=False)

    threads = [threading.Thread(target=go, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected(xs)] * 2
    assert set(stored(folder)) == set(xs)
    assert len(list(folder.iterdir())) == len(xs)
    assert max(starts(log).values()) <= 2


@pytest.mark.usefixtures("inline")
def test_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each cell that ends, counted; none with progress=False, a bar with progress=True."""
    cells = [{"what": what, "log": str(tmp_path / "log")} for what in ("fine", "raise")]
    with pytest.raises(RuntimeError):
        run_cells(cells, AWKWARD, tmp_path / "cells")
    start, first, rest, second = capsys.readouterr().err.splitlines()
    assert start.startswith("sweep: 2 runs, 2 at a time; how long they take is estimated after the first one")
    assert rest.startswith("sweep: about 1 s (estimate: 1 s a run, as the first one took)")
    assert first.startswith('[1/2] what="fine"')
    assert second.startswith('[2/2] what="raise"')
    assert "failed, ValueError: no such rank" in second
    with pytest.raises(RuntimeError):
        run_cells(cells, AWKWARD, tmp_path / "cells", progress=False)
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError):
        run_cells(cells, AWKWARD, tmp_path / "cells", progress=True)
    bar = capsys.readouterr().err
    assert "2/2" in bar
    assert "[2/2]" not in bar


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"function": "sweep_cells"}, ValueError, "package.module:name"),
        ({"function": "__main__:square"}, ValueError, "package.module:name"),
        ({"function": "sweep_cells:cube"}, ValueError, "no function 'cube'"),
        ({"function": "no_such_module:f"}, ModuleNotFoundError, "no_such_module"),
        ({"jobs": 0}, ValueError, "jobs is 0"),
        ({"jobs": True}, ValueError, "jobs is True"),
        ({"cells": [{"x": 1}, [2]]}, TypeError, r"cell 1 is \[2\]"),
        ({"cells": [{1: 1}]}, TypeError, "cell 0"),
        ({"cells": [{"x": {1}}]}, TypeError, "cell 0.*JSON"),
        ({"cells": [{"x": float("nan")}]}, ValueError, "cell 0.*JSON"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], says: str, tmp_path: Path) -> None:
    """Before anything runs, and before the folder is made."""
    arguments = {"cells": [{"x": 1, "log": str(tmp_path / "log")}], "function": SQUARE, "folder": tmp_path / "cells"}
    with pytest.raises(error, match=says):
        run_cells(**{**arguments, **change})
    assert not list(tmp_path.iterdir())


# ---- local processes ------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_one_thread_a_process(jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process is set to, OpenBLAS itself and the compiled loops say one thread, in another process."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "LANCE_REF_THREADS"):
        monkeypatch.setenv(name, "2")
    (result,) = run_cells([{}], "sweep_cells:threads", tmp_path, jobs=jobs, progress=False)
    assert result["blas"] in (1, None)
    assert (result["kernels"], result["setting"]) == (1, "1")
    assert result["process"] != os.getpid()
    assert os.environ["LANCE_REF_THREADS"] == "2"


def test_failed_cells_do_not_stop_the_others(tmp_path: Path) -> None:
    """One line tells how many failed and how the first did; a cell that kills its process takes no other along."""
    log, whats = tmp_path / "log", ["fine", "die", "raise", "exit", "set", "list", "good"]
    cells = [{"what": what, "log": str(log)} for what in whats]
    with pytest.raises(
        RuntimeError, match=r'^5 of the 7 cells that ran failed, the first with what="die".*process died'
    ) as caught:
        run_cells(cells, AWKWARD, tmp_path / "cells", progress=False)
    assert "\n" not in str(caught.value)
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "cells").iterdir()]
    assert {document["result"]["what"] for document in documents} == {"fine", "good"}
    before = starts(log)
    with pytest.raises(
        RuntimeError, match=r'^1 of the 1 cells that ran failed, .*what="raise".*no such rank'
    ) as caught:
        run_cells([cells[0], cells[2], cells[6]], AWKWARD, tmp_path / "cells", jobs=1, progress=False)
    assert "sweep_cells.py" in "".join(caught.value.__notes__), "the cell's traceback"
    assert starts(log) == before + Counter(["raise"])


FULL_DISK = """
import sys
sys.path.insert(0, sys.argv[1])
from analysis import sweep
def full(*_):
    raise OSError("no space left")
sweep.write_json = full
cells = [{"x": x, "log": sys.argv[2], "seconds": 0.3 * x} for x in range(6)]
try:
    sweep.run_cells(cells, "sweep_cells:square", sys.argv[3], progress=False)
except OSError as error:
    print(error)
"""


def test_a_sweep_that_ends_early_says_nothing_more(tmp_path: Path) -> None:
    """The error alone, without the pool's warnings about what it had still been given."""
    places = [str(HERE), str(tmp_path / "log"), str(tmp_path / "cells")]
    words = [sys.executable, "-W", "default", "-c", FULL_DISK, *places]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "no space left\n"
    assert done.stderr == ""


DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background of a shell
sys.path.insert(0, sys.argv[1])
from analysis.commands.sweep import run_cells
cells = [{"x": x, "log": sys.argv[2], "wait_for": sys.argv[4] if x > 2 else None} for x in range(6)]
run_cells(cells, "sweep_cells:square", sys.argv[3], progress=False)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_killed_goes_on_where_it_was(number: int, tmp_path: Path) -> None:
    """Killed with three cells finished and two under way: the three are not run again, and no process goes on."""
    log, folder, gate = tmp_path / "log", tmp_path / "cells", tmp_path / "gate"
    arguments = [sys.executable, "-c", DRIVER, str(HERE), str(log), str(folder), str(gate)]
    with subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL) as driver:
        wait_until(lambda: len(starts(log)) == 5 and len(stored(folder)) == 3)
        driver.send_signal(number)
        assert driver.wait(30) != 0
    workers = {int(words[2]) for words in read_log(log)}
    wait_until(lambda: not any(Path(f"/proc/{pid}/fd").exists() and alive(pid) for pid in workers))
    gate.touch()
    cells = [{"x": x, "log": str(log), "wait_for": str(gate) if x > 2 else None} for x in range(6)]
    sweep_inline(cells, folder)
    assert starts(log) == {"0": 1, "1": 1, "2": 1, "3": 2, "4": 2, "5": 1}
    assert {x: document["result"]["square"] for x, document in stored(folder).items()} == {x: x * x for x in range(6)}


def alive(pid: int) -> bool:
    """Whether a process runs, a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sweep_inline(cells: list[dict[str, Any]], folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANCE_REF_THREADS", "1")
        patch.setattr(sweep, "_in_processes", lambda tasks, jobs: ((task, sweep.run_cell(task)) for task in tasks))
        assert run_cells(cells, SQUARE, folder, progress=False) == expected(cell["x"] for cell in cells)


# ---- a Dask cluster ----------------------------------------------------------------------------


def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    """One of two workers is killed while it runs a cell: all cells finish, those stored by then run once only."""
    distributed = pytest.importorskip("distributed")
    log, folder, gate = tmp_path / "log", tmp_path / "cells", tmp_path / "gate"
    cells = [*squares(log, [0], wait_for=str(gate)), *squares(log, range(1, 8))]
    at_the_kill: dict[Any, Any] = {}

    def kill() -> None:
        try:
            wait_until(lambda: starts(log)["0"] and len(stored(folder)) >= 3)
            victim = next(int(pid) for what, x, pid in read_log(log) if (what, x) == ("start", "0"))
            at_the_kill.update(stored(folder))
            os.kill(victim, signal.SIGKILL)
        finally:
            gate.touch()

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL"
    ) as cluster:
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            results = run_cells(cells, SQUARE, folder, scheduler=cluster.scheduler_address, progress=False)
        finally:
            killer.join()
    assert results == expected(range(8))
    assert {x: document["result"] for x, document in stored(folder).items()} == dict(enumerate(results))
    counts = starts(log)
    assert 0 not in at_the_kill
    assert counts["0"] == 2, "killed once, run again by another process"
    assert len(at_the_kill) >= 3
    assert all(counts[str(x)] == 1 for x in at_the_kill)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "carrier-pigeon://127.0.0.1:1"])
def test_a_scheduler_that_does_not_answer(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the address, soon."""
    pytest.importorskip("distributed")
    monkeypatch.setattr(sweep, "CONNECT_SECONDS", 0.5)
    with pytest.raises(ConnectionError, match=re.escape(address)) as caught:
        run_cells(squares(tmp_path / "log", [1]), SQUARE, tmp_path / "cells", scheduler=address, progress=False)
    assert "\n" not in str(caught.value)


def test_a_scheduler_without_dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the package to install."""
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match="python -m pip install distributed"):
        run_cells(squares(tmp_path / "log", [1]), SQUARE, tmp_path / "cells", scheduler="tcp://127.0.0.1:1")


def test_the_first_line_says_how_long_and_where(
    inline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From what was measured before, or from the runs that are finished; told as an estimate, with its basis."""
    log, folder = tmp_path / "log", tmp_path / "cells"
    run_cells(squares(log, range(4)), SQUARE, folder, expected=90.0, jobs=2)
    (start, *rest) = capsys.readouterr().err.splitlines()
    assert start == (
        "sweep: 4 runs, 2 at a time; about 3 min (estimate: 2 min a run, as measured before on two cores); what is "
        f"finished is kept in {folder}"
    )
    assert not [line for line in rest if "estimate" in line]
    run_cells(squares(log, range(5)), SQUARE, folder, expected=90.0, jobs=2)
    assert "1 run, 1 at a time; about 1 s (estimate: 1 s a run, as the finished ones took)" in capsys.readouterr().err


def test_cells_are_named_by_what_differs(inline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each finished cell says what tells it from the others, not what all have in common."""
    run_cells(squares(tmp_path / "log", range(2)), SQUARE, tmp_path)
    _, first, _, second = capsys.readouterr().err.splitlines()
    assert first.startswith("[1/2] x=0: ")
    assert second.startswith("[2/2] x=1: ")
