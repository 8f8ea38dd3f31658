"""What all tests share: one deterministic Hypothesis profile, and where the real data are."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ["LANCE_REF_OFFLINE"] = "1"  # no test reaches out, nor depends on what was downloaded before
os.environ["LANCE_REF_CACHE"] = str(Path(__file__).with_name("no-such-cache"))

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


@pytest.fixture(scope="module", autouse=True)
def _objects_of_before_are_not_searched() -> None:
    """Collections of garbage pass over all that lives before the first test of a file.

    The tests of memory collect garbage before they measure, hundreds of times. Nearly all objects of the process are
    modules (PyTorch and what it imports above all), functions and tests, and to search these takes up to 0.8 s each.
    """
    gc.collect()
    gc.freeze()
