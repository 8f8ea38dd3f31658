"""Compiled loops in forked children, and where Numba's cache has no place on the disk."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sweep_cells import openblas_threads

import lance_ref
from analysis.commands.provenance import THREAD_SETTINGS, blas_threads, provenance
from lance_ref.algebra.kernels import threads as kernels

needs_numba = pytest.mark.skipif(not kernels.numba_enabled(), reason="Numba is switched off or not installed")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
SECONDS = 120
"""Of a whole process with its children, which takes 2 to 8 when nothing hangs."""


def finish(command: list[str], **options: object) -> tuple[int, str, str]:
    """Exit code and both outputs of a process; after :data:`SECONDS` it and its children are killed."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        pytest.fail(f"{' '.join(command[1:])} did not end within {SECONDS} seconds; it printed:\n{out}")
    return process.returncode, out, err


@needs_numba
@needs_fork
def test_children_run_the_loops_that_their_parent_ran() -> None:
    """A fork copies no threads: a child that waited for its parent's pool, or for a lock, would hang for ever.

    All ways to a child in one process, which compiles once; what it has printed says where it hangs.
    """
    ways = ["multiprocessing", "multiprocessing-joblib", "loky", "os.fork", "grandchild", "compiling"]
    if importlib.util.find_spec("torch") is not None:
        ways.append("DataLoader")
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "fork_case.py"), *ways]
    root = str(Path(lance_ref.__file__).parents[1])
    env = {**os.environ, "LANCE_REF_THREADS": "2", "PYTHONPATH": root, "PYTHONWARNINGS": "ignore"}
    code, out, err = finish(command, env=env)
    assert (code, out.splitlines()) == (0, [f"{how}: the same" for how in ways]), err


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Path]:
    """The folder of a copy of the package that its owner may only read."""
    package = tmp_path / "site" / "lance_ref"
    shutil.copytree(Path(lance_ref.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    for path in [*package.rglob("*"), package]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield package.parent
    for path in [package, *package.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


LOOPS = """
import ctypes, os
if os.getuid() == 0:  # root may write everywhere, until it gives its capabilities up
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
import numpy as np
from lance_ref import kernels, kernels_elementwise as e
x, mask = np.arange(16.0), np.packbits(np.arange(16) % 3 == 0)
for dtype in (np.float64, np.float32):
    assert (e.apply_mask(mask, x.astype(dtype)) == e.apply_mask_numpy(mask, x.astype(dtype))).all()
print(kernels.__file__)
"""


@needs_numba
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="permissions as on Linux")
@pytest.mark.parametrize("cache", ["nowhere", "a folder of others", "unset", "its own"])
def test_a_package_that_nobody_may_write_to(cache: str, installed: Path, tmp_path: Path) -> None:
    """Right results without a cache, and one line that says what to set; none where NUMBA_CACHE_DIR can be written."""
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777 if cache == "its own" else 0o555)
    locked = tmp_path / "locked"
    locked.mkdir(0o555)
    home = str(locked / "home")  # does not exist, and cannot be made
    env = {**os.environ, "PYTHONPATH": str(installed), "HOME": home, "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        env.pop(name, None)
    if cache != "unset":
        env["NUMBA_CACHE_DIR"] = home if cache == "nowhere" else str(folder)
    code, out, err = finish([sys.executable, "-c", LOOPS], env=env, cwd="/")
    loops = installed / "lance_ref" / "algebra" / "kernels" / "threads.py"
    assert (code, out) == (0, f"{loops}\n"), err
    if cache == "its own":
        assert err == ""
        assert list(folder.rglob("*.nbi"))
    else:
        assert len(err.splitlines()) == 1
        assert "NUMBA_CACHE_DIR" in err


@needs_numba
@pytest.mark.parametrize("fault", ["no locator", "full disk", "empty index", "cut index"])
def test_a_cache_that_fails_stops_no_loop(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No place, no room, or files cut off by a crash: compiled anew, right, and said once."""
    from numba.core import caching, config

    def fill(start, stop, out):  # type: ignore[no-untyped-def]
        for i in range(start, stop):
            out[i] += i

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "SERIAL_ELEMENTS", 0)
    monkeypatch.setattr(kernels, "_threads", lambda: 2)
    kernels._tell_uncached.cache_clear()
    if fault == "no locator":
        monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    elif fault == "full disk":

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(caching.IndexDataCacheFile, "_save_index", full)
    else:
        kernels.Loops(fill).run(2, 2, np.zeros(2, np.int64))
        (index,) = tmp_path.rglob("*.nbi")
        index.write_bytes(index.read_bytes()[: 0 if fault == "empty index" else -20])
    capsys.readouterr()
    loops = kernels.Loops(fill)
    for dtype in (np.int64, np.float64, np.int64):
        out = np.zeros(7, dtype)
        loops.run(7, 7, out)
        np.testing.assert_array_equal(out, np.arange(7))
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "NUMBA_CACHE_DIR" in message
    kernels._tell_uncached.cache_clear()


@needs_numba
def test_an_error_of_the_loops_is_no_error_of_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    """What Numba cannot compile is raised as it comes, and nothing is said about its cache."""

    def odd(start, stop, out):  # type: ignore[no-untyped-def]
        out[start] = no_such_name  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(Exception, match="no_such_name"):
        kernels.Loops(odd).run(1, 1, np.zeros(1))
    assert capsys.readouterr().err == ""


@needs_numba
def test_a_wrong_setting_of_numbas_cache_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no missing cache, and must not pass for one."""
    from numba.core import caching

    def refuse(*arguments: object) -> None:
        raise RuntimeError("Unknown cache locator class: 'nonsense'")

    monkeypatch.setattr(caching.CacheImpl, "__init__", refuse)
    with pytest.raises(RuntimeError, match="nonsense"):
        kernels.Loops(lambda start, stop: None).run(1, 1)


def test_results_say_with_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings as they are, and what is in use, which a setting made too late does not change."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    found = provenance("experiments.adapt", 0)["threads"]
    assert set(found) == {*THREAD_SETTINGS, "used"}
    assert found["OPENBLAS_NUM_THREADS"] == "7"
    assert found["NUMBA_NUM_THREADS"] == "default"
    assert found["used"] == {"blas": openblas_threads(), "loops": kernels._threads()}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_threads_in_use_follow_the_setting(threads: int) -> None:
    """A process that was started with a setting reports it as used."""
    if blas_threads() is None:
        pytest.skip("this NumPy's library of matrix products cannot be asked")
    code = "from analysis.commands.provenance import provenance; print(provenance('m', 0)['threads']['used'])"
    env = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads), "LANCE_REF_THREADS": str(3 - threads)}
    root = Path(lance_ref.__file__).parents[1]
    code_, out, err = finish([sys.executable, "-c", code], env=env, cwd=root)
    assert (code_, out) == (0, f"{{'blas': {threads}, 'loops': {3 - threads}}}\n"), err
