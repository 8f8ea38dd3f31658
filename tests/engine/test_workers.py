"""Work in several threads: every part once, errors and NumPy's settings as in one, BLAS left as it was."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.check.measure import compare
from analysis.reports.predict import predict
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.engine import products, workers
from lance_ref.engine.counting import count_macs, matmul
from lance_ref.engine.workers import blas_alone, product_threads, share_out


class Blas:
    """Stands for OpenBLAS: remembers how many threads it was told to take."""

    def __init__(self, threads: int) -> None:
        self.threads, self.told = threads, [threads]

    def read(self) -> int:
        return self.threads

    def write(self, threads: int) -> None:
        self.threads = threads
        self.told.append(threads)


@pytest.fixture
def blas(monkeypatch: pytest.MonkeyPatch) -> Iterator[Blas]:
    found = Blas(3)
    monkeypatch.setattr(workers, "_blas", lambda: found)
    monkeypatch.setattr(workers, "threads", lambda: 2)
    yield found
    assert found.threads == 3


@given(parts=st.integers(1, 5), count=st.integers(0, 12))
def test_every_thing_is_done_once(parts: int, count: int) -> None:
    """However many parts, without gap or overlap, and never a part without a thing but for none at all."""
    seen: list[tuple[int, int]] = []
    share_out(parts, count, lambda start, stop: seen.append((start, stop)))
    assert sorted(i for start, stop in seen for i in range(start, stop)) == list(range(count))
    assert len(seen) == max(1, min(parts, count))


def test_the_parts_run_at_the_same_time() -> None:
    """Two parts that wait for each other would never end one after the other."""
    both = threading.Barrier(2, timeout=30)
    share_out(2, 2, lambda start, stop: both.wait())


def test_what_a_part_shares_out_runs_in_it() -> None:
    """A pool whose threads waited for others of the same pool could wait for ever."""
    inner: list[tuple[int, int, bool]] = []

    def outer(start: int, stop: int) -> None:
        here = threading.get_ident()
        share_out(4, 8, lambda i, j: inner.append((i, j, threading.get_ident() == here)))

    share_out(3, 3, outer)
    assert inner == [(0, 8, True)] * 3
    found: list[int] = []
    share_out(2, 2, lambda start, stop: found.append(start))
    assert sorted(found) == [0, 1]  # afterwards work is shared out again


def test_an_error_waits_for_the_other_parts() -> None:
    """What a part raises is raised when all are through, the calling thread's first."""
    done = threading.Event()

    def work(start: int, stop: int) -> None:
        if start == 0:
            raise ZeroDivisionError
        time.sleep(0.2)
        done.set()

    with pytest.raises(ZeroDivisionError):
        share_out(2, 2, work)
    assert done.is_set()
    with pytest.raises(KeyError):
        share_out(2, 2, lambda start, stop: {}[start] if start else None)


def test_numpys_settings_hold_in_all_parts() -> None:
    """``np.errstate`` of the caller; a thread of the pool would warn otherwise, and a warning is an error here."""
    with np.errstate(divide="ignore"):
        share_out(2, 2, lambda start, stop: np.ones(1) / np.zeros(1))


@pytest.fixture
def slow_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of the pool are put aside for a while when a part is through and its caller goes on."""
    real = Future.set_result

    def set_result(self: Future[Any], result: Any) -> None:
        real(self, result)
        time.sleep(0.05)

    monkeypatch.setattr(Future, "set_result", set_result)


@pytest.mark.usefixtures("slow_threads")
def test_a_part_that_is_through_keeps_nothing() -> None:
    """Arrays that it knew are free, and may be written over, as soon as the caller lets go of them."""
    array = np.ones(3)
    alive = weakref.ref(array)

    def work(start: int, stop: int, array: np.ndarray = array) -> None:
        array[start:stop] = 2

    share_out(3, 3, work)
    assert array.tolist() == [2, 2, 2]
    del array, work
    assert alive() is None


@pytest.mark.skipif(not numba_enabled(), reason="peaks are predicted for the compiled loops")
@pytest.mark.usefixtures("slow_threads")
@pytest.mark.parametrize("count", ["2", "4"])
def test_a_peak_does_not_depend_on_when_threads_run(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread holds the arena of a fused pass, or a map, when it has done its part."""
    with monkeypatch.context() as patch:
        patch.setenv("LANCE_REF_THREADS", count)
        workers.threads.cache_clear()
        workers.pool.cache_clear()
        comparison = compare(predict("convnet", 2, tune="last:1", methods="bp", with_weights=True), peaks=True)
    workers.threads.cache_clear()
    workers.pool.cache_clear()
    assert comparison.agrees, str(comparison)


def test_blas_is_left_as_it_was(blas: Blas) -> None:
    """Within each other the outermost block sets the number and sets it back, also where something is raised."""
    assert product_threads() == 2
    with blas_alone:
        assert blas.threads == 1
        with blas_alone:
            assert blas.threads == 1
        assert blas.threads == 1
        assert product_threads() == 2  # of before
    assert blas.told == [3, 1, 3]
    with pytest.raises(ZeroDivisionError), blas_alone:
        raise ZeroDivisionError
    assert blas.told == [3, 1, 3, 1, 3]


def test_a_blas_of_one_thread_is_obeyed(blas: Blas) -> None:
    """``OPENBLAS_NUM_THREADS=1`` means products in one thread; so does a part of something that is shared out."""
    blas.threads = 1
    assert product_threads() == 1
    blas.threads = 3
    seen: list[int] = []
    share_out(2, 2, lambda start, stop: seen.append(product_threads()))
    assert seen == [1, 1]


def test_without_control_nothing_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another BLAS keeps its own threads, and a product is one call of it."""
    monkeypatch.setattr(workers, "_blas", lambda: None)
    assert product_threads() == 1
    with blas_alone:
        assert product_threads() == 1


def test_a_forked_child_sets_the_number_back(blas: Blas) -> None:
    """The thread that was inside is not in the child, and would never leave the block."""
    mine = workers._BlasAlone()
    mine.__enter__()
    mine.reset()
    assert blas.threads == 3
    with mine:
        assert blas.threads == 1


def test_numpys_own_blas_is_found() -> None:
    """In NumPy's wheels it is an OpenBLAS, whose number of threads can be read and set."""
    if "openblas" not in str(np.show_config(mode="dicts")):  # type: ignore[no-untyped-call]
        pytest.skip("NumPy has another BLAS here")
    blas = workers._blas()
    assert blas is not None
    before = blas.read()
    assert before >= 1
    with blas_alone:
        assert blas.read() == 1
    assert blas.read() == before


# ---- products ----------------------------------------------------------------------------------

SHAPES = [
    ((7, 5), (5, 3)), ((2, 5), (5, 9)), ((4, 7, 5), (4, 5, 3)), ((7, 5), (4, 5, 3)), ((4, 7, 5), (5, 3)),
    ((1, 7, 5), (4, 5, 3)), ((2, 3, 7, 5), (3, 5, 2)), ((1, 1, 5), (1, 5, 1)), ((4, 1, 7, 5), (3, 5, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES, ids=str)
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("given_out", [False, True])
def test_products_in_parts_are_those_of_numpy(
    a_shape: Any, b_shape: Any, parts: int, given_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along the batch, rows or columns, broadcast or not, into an array that is there or a new one; counted once."""
    monkeypatch.setattr(products, "ALONE_MACS", 0)
    monkeypatch.setattr(products, "SHARED_MACS", 0)
    monkeypatch.setattr(products, "product_threads", lambda: parts)
    calls: list[tuple[int, int]] = []
    real = products.share_out
    monkeypatch.setattr(products, "share_out", lambda *args: (calls.append(args[:2]), real(*args))[1])
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(a_shape), rng.standard_normal(b_shape)
    expected = np.matmul(a, b)
    out = np.full(expected.shape, np.nan) if given_out else None
    with count_macs() as counter:
        found = matmul(a, b, out=out)
    batch, longest = expected.shape[:-2], max(expected.shape[-2:])
    assert calls == [(parts, batch[0] if batch and batch[0] >= parts else longest)]
    assert out is None or found is out
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)
    assert counter.by_kind()["forward"] == expected.size * a_shape[-1]


def test_a_product_with_itself_is_left_to_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of A Aᵀ BLAS computes a half; in parts it would be the whole. Other products of the same array are shared out."""
    shared: list[str] = []
    monkeypatch.setattr(products, "ALONE_MACS", 0)
    monkeypatch.setattr(products, "SHARED_MACS", 0)
    monkeypatch.setattr(products, "product_threads", lambda: 2)
    monkeypatch.setattr(products, "_in_parts", lambda parts, a, b, out: shared.append("yes") or np.matmul(a, b))
    A = np.random.default_rng(0).standard_normal((6, 6))
    for b, expected in ((A.T, []), (A, ["yes"]), (A.T.copy(), ["yes"])):
        shared.clear()
        np.testing.assert_allclose(products.product(A, b), A @ b)
        assert shared == expected
    shared.clear()
    np.testing.assert_allclose(products.product(A[:], A[:]), A @ A)  # the same memory, but not transposed
    assert shared == ["yes"]
    view = A[:4]
    shared.clear()
    products.product(view.T, view)
    assert shared == []


@pytest.mark.parametrize(("value", "message"), [(np.inf, "invalid value"), (3e38, "overflow")])
def test_shared_products_warn_as_others_do(value: float, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, in the calling thread, and by the caller's settings."""
    for name in ("ALONE_MACS", "SHARED_MACS"):
        monkeypatch.setattr(products, name, 0)
    monkeypatch.setattr(products, "product_threads", lambda: 2)
    signs = np.array([[1, -1, 0]] * 2 if value == np.inf else [[1, 1, 1]] * 2, np.float32)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        matmul(signs, np.full((3, 4), value, np.float32))
    assert len(caught) == 1
    with np.errstate(all="ignore"):
        assert not np.isfinite(matmul(signs, np.full((3, 4), value, np.float32))).any()


def test_small_products_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the limit one thread makes them, and BLAS is told to wake none of its own."""
    monkeypatch.setattr(products, "product_threads", lambda: pytest.fail("a small product asks for threads"))
    monkeypatch.setattr(products, "SHARED_MACS", 40 * 50 * 60 + 1)
    monkeypatch.setattr(products, "ALONE_MACS", 40 * 50 * 60 - 1)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 50)), rng.standard_normal((50, 60))
    np.testing.assert_array_equal(products.product(a, b), np.matmul(a, b))
