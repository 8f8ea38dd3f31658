"""What all tests share: a deterministic Hypothesis profile, how many processes, and where the real data are."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator
from pathlib import Path

import joblib
import pytest
from hypothesis import HealthCheck, settings

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and so may a shell: what is printed would have another width
# Two processes share two cores: products of matrices that took a thread a core would take four
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LANCE_REF_THREADS", "2")  # each holds an arena: what is printed of memory depends on it
os.environ["LANCE_REF_OFFLINE"] = "1"  # no test reaches out, nor depends on what was downloaded before
os.environ["LANCE_REF_CACHE"] = str(Path(__file__).with_name("no-such-cache"))

from lance_ref.engine import workers

settings.register_profile(
    "lance_ref",
    deadline=None,  # the first call of a kernel compiles it
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("lance_ref")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets and weights; tests that need it are skipped without it."""
    folder = os.environ.get("LANCE_REF_DATA")
    if not folder:
        pytest.skip("LANCE_REF_DATA is not set")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"LANCE_REF_DATA is {folder!r}, which is no folder")
    return path


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation for itself, as with ``LANCE_REF_FUSE=0``: for comparisons to the last bit."""
    monkeypatch.setattr("lance_ref.fused.deferral.enabled", lambda: False)


@pytest.fixture
def single_thread(monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """One thread for loops, products and fused passes: each has objects of its own, for which 5 % leave no room."""
    with monkeypatch.context() as patch:
        patch.setenv("LANCE_REF_THREADS", "1")
        workers.threads.cache_clear()
        yield
    workers.threads.cache_clear()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes ``-n auto`` starts: one a core, at most four, and none for single files."""
    named = [Path(str(argument).partition("::")[0]) for argument in config.option.file_or_dir]
    if named and all(path.is_file() for path in named):
        return 0
    cores = joblib.cpu_count()  # no more than a container may use
    return min(cores, 4) if cores > 1 else 0


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """No garbage is looked for while tests are collected: objects only become more then, and 3 s would be lost."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_runtest_setup() -> None:
    """Let the garbage collector pass over all that was there before a test, whenever modules were imported.

    The tests of memory collect garbage before they measure, hundreds of times. Nearly all objects of this process
    belong to modules (PyTorch's above all) and to the tests themselves; to search these takes up to 0.8 s each time.
    """
    global _modules
    if len(sys.modules) != _modules:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()


_modules = 0
"""How many were imported when objects were last set aside."""
