"""Ctrl-C in real processes: one line, exit code 130, nobody left running; and two runs in one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lance_ref.io import stopping as _stopping

ROOT = Path(__file__).parents[3]
QUICK = ["experiments.finetune", "--quick", "--methods", "bp", "lance", "--epochs=400", "--jobs=2"]
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def start(*words: str) -> subprocess.Popen[str]:
    """A command in a group of its own, as in a terminal; SIGINT may be ignored where the tests run."""
    return subprocess.Popen(
        [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=ENVIRONMENT, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def group(leader: int) -> set[int]:
    """Processes of the group that still run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stop(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Ctrl-C of a terminal, which goes to all processes of the group; exit code, and lines of stderr."""
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    wait_until(lambda: not group(process.pid))
    return process.returncode, error.splitlines()


ABOUT = ("about ", "sweep: ", "how long ")
"""How a line begins that says what a command takes."""

LONG = [
    ["experiments.descent", "--trials=100000"],
    ["analysis.cost_model", "--net", "mobilenetv2", "--batch", "64", "--measure"],
    ["benchmarks.steps"],
]


@pytest.mark.parametrize(
    ("words", "seconds"),
    [*((words, seconds) for seconds in (0, 0.9) for words in LONG), (["lance_ref.conformance", "--write", "kit"], 0)],
)
def test_one_line_wherever_it_is(words: list[str], seconds: float, tmp_path: Path) -> None:
    """While it imports or works; before the first module of ours, Ctrl-C is Python's."""
    process = start(*(str(tmp_path / "kit") if word == "kit" else word for word in words))
    mapped = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "numpy" in mapped.read_text(encoding="utf-8"))
    time.sleep(seconds)
    code, lines = stop(process)
    assert code == 130
    assert lines[-1] == f"python -m {words[0]}: stopped; the same command starts from the beginning"
    assert all(line.startswith(ABOUT) for line in lines[:-1])


@pytest.mark.parametrize("when", ["imports of the pool", "cells"])
def test_a_sweep_ends_its_processes(when: str, tmp_path: Path) -> None:
    """Workers are ended, no traceback of theirs is printed, and the line names the folder."""
    process = start(*QUICK, f"--folder={tmp_path / 'runs'}")
    wait_until(lambda: len(group(process.pid)) >= 4)  # two trackers of resources, then the workers
    if when == "cells":
        time.sleep(2)
    code, lines = stop(process)
    assert code == 130
    assert lines[-1] == (
        f"python -m experiments.finetune: stopped; finished cells are kept in {tmp_path / 'runs'}, and the same "
        "command goes on from there"
    )
    assert all(line.startswith(ABOUT) for line in lines[:-1])


def test_two_runs_of_one_command_in_one_folder(tmp_path: Path) -> None:
    """The second waits for the first, runs nothing again, and says the same."""
    words = ["experiments.continual", "--quick", "--learners", "gpm", "lance", "--tasks=2", "--epochs=1", "--seeds=2"]
    both = [start(*words, f"--folder={tmp_path / 'runs'}", f"--output={tmp_path / name}.json") for name in "ab"]
    for process in both:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    a, b = (json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["rows"] for name in "ab")
    assert a == b  # with the seconds that each run took
    assert len(list((tmp_path / "runs").glob("*.json"))) == 4


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    """The system gives it back; what was finished is taken up."""
    process = start(*QUICK, f"--folder={tmp_path}")
    wait_until(lambda: len(group(process.pid)) >= 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    again = start(*QUICK[:-2], "--epochs=1", f"--folder={tmp_path}")
    _, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    assert "waiting" not in error


def test_run_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What main gives; 130 and a line after an interrupt; the same when a library has made another error of it."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(_stopping, "_end", lambda: None)

    def pressed() -> int:
        _stopping.keep("all is kept")
        raise KeyboardInterrupt

    def hidden() -> int:
        with pytest.raises(KeyboardInterrupt):
            _stopping._press(2, None)
        raise ImportError("numpy could not be imported")

    def broken() -> int:
        raise ZeroDivisionError

    assert _stopping.run(lambda: 1) == 1
    assert capfd.readouterr().err == ""
    assert _stopping.run(pressed) == 130
    assert capfd.readouterr().err.endswith(": stopped; all is kept\n")
    assert _stopping.run(hidden) == 130
    assert capfd.readouterr().err.endswith(": stopped; the same command starts from the beginning\n")
    with pytest.raises(ZeroDivisionError):
        _stopping.run(broken)
    assert signal.getsignal(signal.SIGINT) is before


def test_importing_changes_nothing() -> None:
    """Whoever imports the packages keeps Python's own Ctrl-C."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import lance_ref, analysis.commands.cli; "
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_children_leave_it_to_their_parent() -> None:
    """SIGINT is blocked in what is started inside, and in nothing else."""
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with _stopping.left_to_parent():
        inside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    outside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (inside.stdout, outside.stdout) == ("True\n", "False\n")
